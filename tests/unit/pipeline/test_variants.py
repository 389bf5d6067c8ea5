"""Serving variants: measured each like the main configuration, listed where they passed, and no obstacle where not."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import load_evidence
import pytest

from containers.errors import UnhealthyError
from containers.hardware.cpu import this_cpu
from evals.drift.pairs import read_drift
from evals.load.load_test import judge
from evals.load.variants import read_variants
from homes import DEMO
from pipeline.operations import load_tests
from pipeline.orchestration.asset_metadata import describe
from pipeline.planner.weights import is_weight_only
from pipeline.serving import deployment
from pipeline.serving.fleet import Resources
from pipeline.settings import Settings
from pipeline.stages import candidate, drift, load
from pipeline.stages.dry_run import DryRun
from pipeline.stages.image import record_of
from pipeline.stages.table import VARIANTS
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe
from registry.errors import VariantError
from registry.manifest import Manifest
from registry.pull import ReleaseMetadata
from unit.pipeline.filled import FillingContext, FillingStore, Models, release
from unit.pipeline.release_evidence import LOAD, drift_of

SLOW = load_evidence.changed(LOAD, {"metrics": {"p95_latency_ms": 9e6}})
SERVE = {"variants": {"short": {"context": 512}, "wide": {"context": 1024, "max_sequences": 8}}}


class Measuring(FillingStore):
    """Notes what is made; the load tests of ``slow`` variants miss their limits, those of ``broken`` ones fail."""

    def __init__(self, root: Path, made: list[Recipe], slow: set[str], broken: set[str]) -> None:
        super().__init__(root, drift_of(1))
        self.made, self.slow, self.broken = made, slow, broken

    def obtain(self, recipe: Recipe, make: Callable[[ArtifactDraft], None]) -> Artifact:
        variant = variant_of(recipe)
        if variant in self.broken:
            raise UnhealthyError("the server ended with status 1 before it was healthy")
        made = super().obtain(recipe, make)
        if not made.cached:
            self.made.append(recipe)
            if variant in self.slow:
                path = made.folder / "load.json"
                path.chmod(0o644)
                path.write_text(SLOW.format())
        return made


def variant_of(recipe: Recipe) -> str | None:
    """The variant of a load test's recipe."""
    serving = recipe.parameters.get("serving") if recipe.stage == "load" else None
    variant: str | None = json.loads(str(serving)).get("variant") if serving else None
    return variant


@dataclass(frozen=True)
class MeasuringContext(FillingContext):
    made: list[Recipe] = field(default_factory=list)
    slow: frozenset[str] = frozenset()
    broken: frozenset[str] = frozenset()

    @property
    def store(self) -> Measuring:
        return Measuring(self.settings.home / "artifacts", self.made, set(self.slow), set(self.broken))


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


def context(models: Models, told: list[str] | None = None, **more: Any) -> MeasuringContext:  # noqa: ANN401
    spec = models.write(serve=SERVE)
    return MeasuringContext(spec, "gptq", models.settings, (told if told is not None else []).append, **more)


def manifest(made: dict[str, Artifact]) -> Manifest:
    return Manifest.parse((made["release"].folder / "release/manifest.json").read_bytes())


def stages_of(made: list[Recipe]) -> list[str]:
    return [recipe.stage for recipe in made]


def test_each_variant_that_passes_is_listed_with_its_own_command_and_evidence(models: Models) -> None:
    told: list[str] = []
    made = release(context(models, told))
    found = manifest(made)
    assert [each.variant for each in found.serving] == [None, "short", "wide"]
    short = found.configuration("short")
    assert short is not None
    assert short.context == 512
    assert ("--max-model-len", "512") in zip(short.command, short.command[1:], strict=False)
    assert {"release/evidence/variants.json", "release/evidence/variants/short/load.json"} <= found.files.keys()
    assert "release/evidence/variants/wide/drift.json" in found.files
    assert told.count("variant `short` passed") == 1
    page = (made["release"].folder / "release/report.html").read_text()
    assert "Serving variants" in page
    assert "<th>short</th>" in page


def test_fp16_is_asked_again_only_where_the_variant_changes_what_it_is_asked(models: Models) -> None:
    """The longest prompt takes 1,024 tokens: it fits `wide`, and not `short`."""
    asked = context(models)
    release(asked)
    answers = [recipe for recipe in asked.made if recipe.stage == "answers"]
    fp16 = [recipe for recipe in answers if "source" in recipe.inputs]
    assert [str(recipe.parameters["serving"]).count("'context': 512") for recipe in fp16] == [0, 1]
    assert len(answers) - len(fp16) == 3
    assert stages_of(asked.made).count("load") == 3
    assert stages_of(asked.made).count("layers") == 1


def test_a_variant_whose_gate_failed_is_not_listed_and_does_not_hold_the_release_up(models: Models) -> None:
    told: list[str] = []
    made = release(context(models, told, slow=frozenset({"short"})))
    found = manifest(made)
    assert [each.variant for each in found.serving] == [None, "wide"]
    with pytest.raises(VariantError, match=r"demo-gptq does not list the variant `short`.*it lists `wide`"):
        found.configuration("short")
    (line,) = [line for line in told if line.startswith("variant `short` is not listed")]
    assert "load fail: p95_latency_ms" in line
    kept = {each.name: each for each in read_variants(made["release"].folder / "release/evidence")}
    assert (kept["wide"].passed, kept["short"].passed) == (True, False)
    assert "no: load fail" in (made["release"].folder / "release/report.html").read_text()
    described = describe(VARIANTS, context(models, slow=frozenset({"short"})), made["variants"])
    assert described["wide"] == "variant `wide` passed"
    assert described["short"] == line
    assert described["short: p95_latency_ms"] == 9e6


def test_a_variant_that_could_not_be_measured_is_tried_again(models: Models) -> None:
    told: list[str] = []
    broken = context(models, told, broken=frozenset({"short"}))
    made = release(broken)
    assert [each.variant for each in manifest(made).serving] == [None, "wide"]
    assert any("variant `short` could not be measured: the server ended with status 1" in line for line in told)
    repaired = context(models)
    assert [each.variant for each in manifest(release(repaired)).serving] == [None, "short", "wide"]
    assert set(stages_of(repaired.made)) == {"load", "variants", "release"}


def test_another_variant_measures_that_one_alone(models: Models) -> None:
    first = context(models)
    release(first)
    spec = models.write(serve={"variants": {**SERVE["variants"], "few": {"max_sequences": 2}}})
    more = MeasuringContext(spec, "gptq", models.settings, lambda _: None)
    made = release(more)
    assert [each.variant for each in manifest(made).serving] == [None, "few", "short", "wide"]
    assert sorted(stages_of(more.made)) == ["load", "release", "variants"]  # `few` changes no answer
    assert isinstance(DryRun(more).last(), Artifact)


def test_a_model_without_variants_lists_the_main_configuration_alone(models: Models) -> None:
    made = release(models.context(models.write(), "gptq"))
    assert [each.variant for each in manifest(made).serving] == [None]
    assert not [name for name in manifest(made).files if "variants" in name]


def test_what_this_cpu_does_not_support_is_inconclusive_before_a_server_starts(models: Models, tmp_path: Path) -> None:
    """No engine is there: anything that started one would fail."""
    spec = models.write(serve={"variants": {"fp8": {"kv_cache": "fp8"}}})
    made = release(models.context(models.write(), "gptq"))
    narrow = Settings.read({"SLIPWAY_HOME": str(tmp_path / "home"), "SLIPWAY_CPU_ISA": "avx2"})
    asked = replace(models.context(spec, "gptq"), settings=narrow, variant="fp8")
    assert asked.unsupported(experts=False) == (
        "`kv_cache: fp8` needs a CPU with AVX-512 or AMX, and this one has avx2: test it on another machine"
    )
    draft = ArtifactDraft(folder=tmp_path / "candidate", scratch=tmp_path / "scratch")
    draft.folder.mkdir()
    candidate.make(asked, made, draft)
    answered = replace(made["image"], notes=draft.notes)
    paired = ArtifactDraft(folder=tmp_path / "drift", scratch=tmp_path / "scratch")
    paired.folder.mkdir()
    drift.make(asked, {**made, "candidate": answered}, paired)
    lost = drift.judge(replace(made["drift"], folder=paired.folder), asked)
    assert (lost.status, lost.cause, lost.blocks) == ("inconclusive", "unsupported", True)
    assert read_drift(paired.folder).lacking == asked.unsupported(experts=False)
    folder = tmp_path / "load"
    folder.mkdir()
    tested = load.measure(asked, spec.load, record_of(made["image"]), made["quantized"], folder, tmp_path)
    held = judge(tested, spec.load)
    assert (held.status, held.cause, held.reason) == ("inconclusive", "unsupported", asked.unsupported(experts=False))


def test_an_fp8_cache_is_supported_from_avx_512_on(models: Models) -> None:
    spec = models.write(serve={"kv_cache": "fp8"})
    own = replace(models.context(spec, "gptq"))
    assert (own.unsupported(experts=False) is None) == (this_cpu(None).instruction_set != "avx2")


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (None, True),
        ({"quant_method": "awq", "bits": 4}, True),
        ({"quant_method": "fp8"}, False),
        ({"config_groups": {"group_0": {"weights": {"num_bits": 4}, "input_activations": None}}}, True),
        ({"config_groups": {"group_0": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}}}, False),
    ],
)
def test_weights_alone_are_quantized_where_no_activations_are(quantization: Any, *, expected: bool) -> None:  # noqa: ANN401
    config = {} if quantization is None else {"quantization_config": quantization}
    assert is_weight_only(config) == expected


def test_a_variant_is_served_and_deployed_with_what_was_measured_of_itself(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = release(context(models))
    folder, of_itself = made["release"].folder, "release/evidence/variants/short/load.json"
    (folder / of_itself).chmod(0o644)
    (folder / of_itself).write_text(load_evidence.changed(LOAD, {"server": {"ranks": 2}}).format())
    assert [Resources.tested(folder, variant).ranks for variant in (None, "short")] == [1, 2]

    def read(_reference: str, names: Sequence[str], **_: object) -> ReleaseMetadata:
        files = {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
        return ReleaseMetadata("1", manifest(made), files | {"config.json": (DEMO / "model/config.json").read_bytes()})

    monkeypatch.setattr(deployment, "read_metadata", read)
    main, short = (deployment.gather("demo-gptq", models.settings, variant)[0] for variant in (None, "short"))
    assert (main.variant, main.measured.ranks, main.context) == (None, 1, 1024)
    assert (short.variant, short.measured.ranks, short.context) == (manifest(made).configuration("short"), 2, 512)


def test_a_comparison_has_a_column_for_each_variant(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_tests, "StageContext", FillingContext)
    spec = models.write(serve=SERVE)
    rows, verdicts, page = load_tests.compare(spec, ["gptq"], spec.load, models.settings, lambda _: print, None)
    assert [row.name for row in rows] == list(verdicts) == ["fp16", "gptq", "gptq, short", "gptq, wide"]
    assert "gptq, short" in page.read_text()
