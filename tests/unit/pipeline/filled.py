"""Homes in which releases are up to date: each artifact under its own recipe, filled by hand and not by a worker."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import yaml
from image_record import image_record

from containers.hardware.cpu import InstructionSet
from containers.image.build import SERVING
from evals.drift.answers import Answers, AskedSuite
from evals.drift.pairs import ChoicePairs, Drift
from evals.drift.suite import TOOL_CALLS
from evals.load.canary import TakenCanary
from homes import DEMO
from pipeline.settings import Settings
from pipeline.spec import ModelSpec, load
from pipeline.stages.context import StageContext
from pipeline.stages.run import run
from pipeline.stages.table import STAGES
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe, Store
from pipeline.store.notes import AnswersNotes
from unit.pipeline.release_evidence import LOAD, QUANTIZED_NOTES, SAMPLE, SCAN, drift_of

_SUITE = AskedSuite(name="demo", digest="sha256:" + "ab" * 32, lm_eval="0.4.13")
# The longest prompt fits a context of 1,024 tokens, and no smaller one.
_ANSWERS = Answers.model_validate(
    {"schema": "slipway.answers/2", "engine": {}, "longest": 1024, "suite": _SUITE, "tasks": {}}
)
CANARY = TakenCanary(prompt="1, 2,", expect=" 3", margin=4.0)
# What stages that need a worker or a server leave behind. The others do their work for real.
_FILES: Mapping[str, Mapping[str, Any]] = {
    "quantized": {"model.safetensors": "packed", "config.json": {}},
    "image": {"image.json": image_record().model_dump_json()},
    "answers": {
        "answers.json": _ANSWERS.model_dump(mode="json", by_alias=True),
        "canary.json": CANARY.model_dump(),
    },
    "layers": {"layers.json": []},
    "drift": {"drift.json": drift_of(1).model_dump(mode="json", by_alias=True)},
    "scan": {"scan.json": SCAN.model_dump(mode="json", by_alias=True), "trivy.json": {}, "sbom.cdx.json": {}},
    "load": {"load.json": LOAD.format(), "requests.jsonl": "", "memory.json": f"[{SAMPLE.model_dump_json()}]"},
}


class FillingStore(Store):
    """Fills an artifact in place of the stage that would make it; ``drift`` is what was lost."""

    def __init__(self, root: Path, drift: Drift) -> None:
        super().__init__(root)
        self.drift = drift

    def obtain(self, recipe: Recipe, make: Callable[[ArtifactDraft], None]) -> Artifact:
        return super().obtain(recipe, self._filling(recipe) if recipe.stage in _FILES else make)

    def _filling(self, recipe: Recipe) -> Callable[[ArtifactDraft], None]:
        stage = recipe.stage
        files = dict(_FILES[stage])
        if stage == "drift":
            files["drift.json"] = self.drift.model_dump(mode="json", by_alias=True)
        if stage == "image":
            labels = {
                **cast("dict[str, str]", recipe.parameters["labels"]),
                SERVING: json.dumps(recipe.parameters["serving"]),
            }
            files["image.json"] = image_record(labels=labels).model_dump_json()

        def fill(draft: ArtifactDraft) -> None:
            for name, content in files.items():
                text = content if isinstance(content, str) else json.dumps(content)
                (draft.folder / name).write_text(text)
            draft.notes.update(QUANTIZED_NOTES if stage == "quantized" else {})
            if stage == "answers":
                draft.note(AnswersNotes(instruction_set=instruction_set_of(recipe)))

        return fill


def instruction_set_of(recipe: Recipe) -> InstructionSet | None:
    """The CPU's that answers, by the recipe of the answers."""
    engine = recipe.parameters["engine"]
    assert isinstance(engine, dict)
    return cast("InstructionSet | None", engine.get("instruction_set"))


@dataclass(frozen=True)
class FillingContext(StageContext):
    """A context in which every stage is done at once, and no engine is needed."""

    lost: int = 1

    @property
    def store(self) -> Store:
        drift = drift_of(self.lost)
        if self.serving.tool_calls is not None:
            called = ChoicePairs(
                items=48, baseline_missing=0, candidate_missing=0, baseline_right=40, candidate_right=40, changed=0,
                chance=0.0, lost_ids=(), gained_ids=(),
            )  # fmt: skip
            assert drift.suite is not None
            suite = drift.suite.model_copy(update={"digest": self.evals.digest})
            drift = drift.model_copy(update={"suite": suite, "tasks": {**drift.tasks, TOOL_CALLS: called}})
        # Each adapter lost what the model did.
        drift = drift.model_copy(update={"adapters": dict.fromkeys(self.spec.serve.adapters, drift)})
        return FillingStore(self.settings.home / "artifacts", drift)

    def has_image(self, _record: object) -> bool:
        return True


class Models:
    """A folder of models' files, and a home that has released them."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings.read({"SLIPWAY_HOME": str(folder / "home"), "SLIPWAY_MODELS": str(folder / "models")})
        self.settings.models.mkdir(parents=True)

    def write(self, model: str = "demo", **changes: Any) -> ModelSpec:  # noqa: ANN401
        """Write a model's file: the demo's with other sections, on a copy of its weights and data."""
        folder = self.settings.models
        if not (folder / model).exists():
            shutil.copytree(DEMO, folder / model, ignore=shutil.ignore_patterns("*.py", "*.md"))
        document = yaml.safe_load(DEMO.with_suffix(".yaml").read_text().replace("file:demo/", f"file:{model}/"))
        (folder / f"{model}.yaml").write_text(yaml.safe_dump({**document, "model": model, **changes}))
        return load(folder / f"{model}.yaml")

    def context(self, spec: ModelSpec, scheme: str, lost: int = 1) -> FillingContext:
        """A context in which one scheme of a model is made."""
        return FillingContext(spec, scheme, self.settings, lambda _: None, lost=lost)

    def release(self, spec: ModelSpec, lost: int = 1) -> dict[str, Artifact | None]:
        """Make every scheme's artifacts, as far as the gates let it; return what was signed."""
        made = {}
        with patch("os.fsync"):  # no test outlives a power cut
            for scheme in spec.schemes:
                made[scheme] = release(self.context(spec, scheme, lost)).get("release")
        return made


def release(context: StageContext) -> dict[str, Artifact]:
    """Run every stage as a run does, as far as the gates let it; return the artifacts by stage."""
    made: dict[str, Artifact] = {}
    for stage in STAGES:
        made[stage.name] = run(stage, context, {name: made[name] for name in stage.inputs})
        if stage.gate and stage.gate.judge(made[stage.name], context).blocks:
            break
    return made
