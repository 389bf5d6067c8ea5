"""Every object of every bundle, for the demo and for four GPUs, is one that Kubernetes and KServe have published."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import kubernetes_validate
import pytest
from bundle_objects import FORMS, RELEASES, VERSIONS, Object, bundle_objects, guides, row
from custom_resources import of_kserve, source
from kubernetes_validate import utils

from checkout import CHECKOUT

Written = Mapping[tuple[str, str], list[Object]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The objects by release and format."""
    return {
        (release, form): bundle_objects(release, form, tmp_path_factory.mktemp("bundle"))
        for release in RELEASES
        for form in FORMS
    }


@pytest.fixture
def _read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the schemas that `kubernetes_validate` reads for each object again."""
    monkeypatch.setattr(utils, "schema_contents", cache(utils.schema_contents))


@pytest.mark.usefixtures("_read_once")
@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_the_objects_of_every_format(written: Written, version: str) -> None:
    for objects in written.values():
        for document in objects:
            if source(document) is None:
                kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("form", ["kserve", "llm-d"])
def test_kserve_takes_its_services(written: Written, release: str, form: str) -> None:
    (service,) = [each for each in written[release, form] if each["apiVersion"].startswith("serving.kserve.io")]
    assert of_kserve(service) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"replica": 2}, "replica"),
        ({"replicas": "2"}, "integer"),
        ({"model": {"name": "demo"}}, "uri"),
        ({"scaling": {"maxReplicas": 3, "wva": {"hpa": {}}}}, "replicas and scaling are mutually exclusive"),
    ],
)
def test_a_service_that_kserve_would_refuse_is_noticed(written: Written, changes: Mapping[str, Any], told: str) -> None:
    service = copy.deepcopy(written["demo", "llm-d"][1])
    service["spec"] |= changes
    assert told in " ".join(of_kserve(service))


def test_the_documentation_tables_what_was_validated(written: Written) -> None:
    forms: dict[str, set[str]] = {}
    for (_, form), objects in written.items():
        for document in objects:
            forms.setdefault(row(document, "{}"), set()).add(form)
    found = {key.format(", ".join(f"`{form}`" for form in FORMS if form in of)) for key, of in forms.items()}
    found |= {row(document, "guide") for document in guides()}
    text = (CHECKOUT / "docs/explanation/serving.md").read_text()
    table = text.partition("| object | formats | validated with |\n|---|---|---|\n")[2].partition("\n\n")[0]
    assert set(table.splitlines()) == found
