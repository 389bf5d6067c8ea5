"""Each key of a model file's `serve` reaches whatever starts or describes a server, and makes only that again."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bundle_evidence
import pytest
from serving_keys import CHAT_TEMPLATE, NAMES, ServingKey, contains, read

from containers.image.build import SERVING
from containers.image.engine_options import KEYS
from containers.image.serving import Override, Serve, changes_fp16
from pipeline.stages.image import record_of
from pipeline.store.artifacts import Artifact
from registry.manifest import MANIFEST, REPORT, Manifest
from registry.provenance import statement
from unit.pipeline.filled import Models, release


@dataclass(frozen=True)
class Released:
    """The demo, released in one scheme as its own file says, in a home in which it can be released again."""

    models: Models
    made: Mapping[str, Artifact]
    runtime: str

    def again(self, serve: Mapping[str, Any], **sections: Any) -> dict[str, Artifact]:  # noqa: ANN401 - of a model file
        """Release it with another section `serve`, and other sections."""
        scheme = {"method": "awq", "backend": "autoawq", "bits": 4, "group_size": 64}
        spec = self.models.write(serve=serve, schemes={"awq": scheme}, runtime=self.runtime, **sections)
        return release(self.models.context(spec, "awq"))

    def changed(self, made: Mapping[str, Artifact]) -> set[str]:
        """The stages that were made again."""
        return {stage for stage, artifact in made.items() if artifact.key != self.made[stage].key}


@pytest.fixture(scope="module")
def by_runtime(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Released]:
    models = Models(tmp_path_factory.mktemp("models"))
    shutil.copy(CHAT_TEMPLATE, models.settings.models)

    @functools.cache
    def first(runtime: str) -> Released:
        return Released(models, Released(models, {}, runtime).again({}), runtime)

    return first


@pytest.fixture(scope="module")
def released(by_runtime: Callable[[str], Released]) -> Released:
    return by_runtime("vllm-cpu")


@dataclass(frozen=True)
class Case:
    """The demo, released with one key of `serve`, and ``before`` without it."""

    key: ServingKey
    before: Released
    made: Mapping[str, Artifact]


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, by_runtime: Callable[[str], Released]) -> Case:
    key = read(request.param)
    before = by_runtime(key.runtime)
    return Case(key, before, before.again(key.serve))


def manifest_of(made: Mapping[str, Artifact]) -> Manifest:
    return Manifest.parse((made["release"].folder / MANIFEST).read_bytes())


def test_every_key_has_a_file() -> None:
    assert set(NAMES) == set(Serve.model_fields) - {"variants"}


def test_a_key_reaches_command_label_manifest_provenance_report_and_bundle(case: Case, tmp_path: Path) -> None:
    manifest = manifest_of(case.made)
    (served,) = manifest.serving
    assert contains(served.command, case.key.command)
    assert not contains(manifest_of(case.before.made).serving[0].command, case.key.command)
    label, before = (json.loads(record_of(made["image"]).labels[SERVING]) for made in (case.made, case.before.made))
    assert {name for name in label if label[name] != before[name]} == {case.key.name}
    parameters = json.loads(statement(manifest))["predicate"]["buildDefinition"]["externalParameters"]
    assert parameters["serving"] == [served.model_dump(mode="json")]
    assert " ".join(case.key.command) in (case.made["release"].folder / REPORT).read_text()
    of_demo = bundle_evidence.manifest(serving=[served.model_dump(mode="json")])
    bundle_evidence.written(bundle_evidence.evidence(manifest=of_demo), tmp_path / "bundle")
    assert bundle_evidence.engine_container(tmp_path / "bundle")["args"] == list(served.command)


def test_a_key_makes_again_what_depends_on_it(case: Case) -> None:
    assert case.before.changed(case.made) == case.key.again
    assert changes_fp16(case.key.name) == case.key.asks_fp16_again  # as the reference says


def test_another_chat_template_under_the_same_name_is_another_image(released: Released) -> None:
    serve = {"chat_template": "file:chat.jinja"}
    before = released.again(serve)
    template = released.models.settings.models / "chat.jinja"
    kept = template.read_text()
    template.write_text(f"{kept}!")
    try:
        after = released.again(serve)
    finally:
        template.write_text(kept)
    assert {name for name in after if after[name].key != before[name].key} == read("chat_template").again
    assert manifest_of(after).serving[0].chat_template != manifest_of(before).serving[0].chat_template


def test_a_chat_template_quantizes_again_only_where_conversations_are_rendered_by_it(released: Released) -> None:
    chats = released.models.settings.models / "chats.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "Why?"}]}\n')

    def changed(calibration: dict[str, Any]) -> bool:
        with_and_without = (
            released.again({"chat_template": "file:chat.jinja"} if template else {}, calibration=calibration)
            for template in (True, False)
        )
        return len({made["quantized"].key for made in with_and_without}) == 2

    assert changed({"uri": "file:chats.jsonl", "samples": 1})
    assert not changed({"uri": "file:demo/calibration.jsonl", "samples": 1})


def test_another_draft_model_makes_another_image_and_does_not_ask_fp16_again(released: Released) -> None:
    folder = released.models.settings.models / "draft"
    shutil.copytree(released.models.settings.models / "demo" / "model", folder)
    serve = {"speculative": {"method": "draft", "source": {"uri": "file:draft"}, "tokens": 4}}
    before = released.again(serve)
    assert released.changed(before) == read("speculative").again
    config = folder / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    after = released.again(serve)
    # What follows from it is filled by hand here, and so the same.
    assert {name for name in after if after[name].key != before[name].key} == {"image"}


def test_what_a_scheme_overrides_leaves_fp16_and_other_schemes_alone(released: Released) -> None:
    scheme = {"method": "awq", "backend": "autoawq", "bits": 4, "group_size": 64, "serve": {"context": 128}}
    spec = released.models.write(schemes={"awq": scheme})
    assert released.changed(release(released.models.context(spec, "awq"))) == read("max_sequences").again


def test_every_key_that_sets_an_option_is_known_to_the_check_of_arguments() -> None:
    assert set(KEYS) == (set(Serve.model_fields) | set(Override.model_fields)) - {"variants", "arguments"}
