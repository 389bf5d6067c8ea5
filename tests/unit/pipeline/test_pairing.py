"""Stages that do two things beside each other: an interrupt ends both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event

import pytest

from containers.hardware.cpu import INSTRUCTION_SETS
from pipeline.errors import WorkerFailed
from pipeline.stages.run import run, run_until
from pipeline.stages.table import BASELINE, DRIFT
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe
from pipeline.workers.launchers.task import Ended, Task
from pipeline.workers.runner import Workers
from unit.pipeline.filled import FillingContext, FillingStore, Models, instruction_set_of
from unit.pipeline.release_evidence import drift_of


@dataclass
class Endless:
    """Runs a worker that never ends by itself."""

    began: Event = field(default_factory=Event)
    was_stopped: bool = False

    def __call__(self, task: Task) -> Ended:
        self.began.set()
        self.was_stopped = task.stop.wait(60)
        raise WorkerFailed("stopped")


class Interrupted(FillingStore):
    """Measures layers for real, and is interrupted once that has begun."""

    def __init__(self, root: Path, endless: Endless) -> None:
        super().__init__(root, drift_of(1))
        self.endless = endless

    def obtain(self, recipe: Recipe, make: Callable[[ArtifactDraft], None]) -> Artifact:
        if recipe.stage == "layers":
            return super(FillingStore, self).obtain(recipe, make)
        if recipe.stage == "answers" and self.endless.began.wait(60):
            raise KeyboardInterrupt
        return super().obtain(recipe, make)


@dataclass(frozen=True)
class InterruptedContext(FillingContext):
    endless: Endless = field(default_factory=Endless)

    @property
    def store(self) -> Interrupted:
        return Interrupted(self.settings.home / "artifacts", self.endless)

    def workers(self, draft: ArtifactDraft) -> Workers:
        workers = Workers(self.settings, self.progress, draft.worker_seconds, launcher=self.endless)
        workers.stop = self.stop
        return workers


def test_an_interrupt_while_a_candidate_is_asked_stops_what_measures_its_layers(tmp_path: Path) -> None:
    models = Models(tmp_path)
    context = FillingContext(models.write(), "gptq", models.settings, lambda _: None)
    made = run_until("baseline", context) | run_until("image", context)
    interrupted = InterruptedContext(context.spec, "gptq", models.settings, lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        run(DRIFT, interrupted, made)
    assert interrupted.endless.was_stopped


def test_fp16_is_asked_anew_where_the_candidate_is_asked_on_another_instruction_set(tmp_path: Path) -> None:
    """As where the image of a pair of another CPU was built anew, and came out with another digest."""
    models = Models(tmp_path)
    context = models.context(models.write(), "gptq")
    made = run_until("image", context)
    source = {name: made[name] for name in ("source", "adapters")}
    told: list[str] = []
    avx2 = replace(context, instruction_set="avx2", progress=told.append)
    elsewhere = run(BASELINE, replace(context, instruction_set="avx512"), source)
    paired = run(DRIFT, avx2, {**made, "baseline": elsewhere})
    assert told == ["FP16 was asked on a CPU with avx512: asking it on this one, with avx2"]
    asked = [record.recipe for _, record in context.store.records("answers")]
    assert sorted((instruction_set_of(each), "image" in each.inputs) for each in asked) == [
        ("avx2", False), ("avx2", True), ("avx512", False),
    ]  # fmt: skip
    here = run(BASELINE, avx2, source)
    assert here.cached
    assert run(DRIFT, avx2, {**made, "baseline": here}).key == paired.key


def test_a_candidate_is_asked_on_the_cpu_of_fp16_though_another_one_has_asked_it(tmp_path: Path) -> None:
    """FP16 is asked before the image is made, which may come out as the one that was paired elsewhere."""
    models = Models(tmp_path)
    context = models.context(models.write(), "gptq")
    made = run_until("image", context)
    source = {name: made[name] for name in ("source", "adapters")}
    own = context.settings.cpu.instruction_set
    other = next(each for each in INSTRUCTION_SETS if each != own)
    elsewhere = replace(context, instruction_set=other)
    run(DRIFT, elsewhere, {**made, "baseline": run(BASELINE, elsewhere, source)})
    baseline = run(BASELINE, replace(context, instruction_set=own), source)
    run(DRIFT, context, {**made, "baseline": baseline})
    asked = [record.recipe for _, record in context.store.records("answers") if "image" in record.recipe.inputs]
    assert {instruction_set_of(recipe) for recipe in asked} == {own, other}
