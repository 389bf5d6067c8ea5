"""Objects of Kyverno, the Prometheus operator, Argo CD and Flux are of the types that their sources have."""

from __future__ import annotations

import copy
from pathlib import Path

from bundle_objects import FORMS, RELEASES, Object, bundle_objects, guides
from custom_resources import of_operators, source


def test_operators_take_the_objects_of_every_format_and_of_the_guides(tmp_path: Path) -> None:
    found: list[Object] = guides()
    for release in RELEASES:
        for form in FORMS:
            folder = tmp_path / release / form
            folder.mkdir(parents=True)
            found += bundle_objects(release, form, folder)
    theirs = [each for each in found if (source(each) or "").startswith("@kubernetes-models")]
    wrong = copy.deepcopy(next(each for each in theirs if each["kind"] == "ServiceMonitor"))
    wrong["spec"]["endpoints"][0]["port"] = 8000
    said = of_operators([*theirs, wrong], tmp_path / "npm")
    assert said[:-1] == [None] * len(theirs)
    assert "port must be string" in (said[-1] or "")
    assert {each["kind"] for each in theirs} == {
        "Application", "Kustomization", "ClusterPolicy", "ImageValidatingPolicy", "ServiceMonitor", "PrometheusRule",
    }  # fmt: skip
