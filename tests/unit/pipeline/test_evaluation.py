"""Stages that do two things beside each other: an interrupt ends both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event

import pytest
from filled import FillingBench, FillingStore, Models

from containers.hardware.cpu import INSTRUCTION_SETS
from pipeline.errors import WorkerFailed
from pipeline.stages import evaluation, table
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe
from pipeline.workers.launchers.task import Ended, Task
from pipeline.workers.runner import Workers


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
        super().__init__(root, lost=1)
        self.endless = endless

    def obtain(self, recipe: Recipe, make: Callable[[ArtifactDraft], None]) -> Artifact:
        if recipe.stage == "layers":
            return super(FillingStore, self).obtain(recipe, make)
        if recipe.stage == "answers" and self.endless.began.wait(60):
            raise KeyboardInterrupt
        return super().obtain(recipe, make)


@dataclass(frozen=True)
class InterruptedBench(FillingBench):
    endless: Endless = field(default_factory=Endless)

    @property
    def store(self) -> Interrupted:
        return Interrupted(self.settings.home / "artifacts", self.endless)

    def workers(self, draft: ArtifactDraft) -> Workers:
        return Workers(self.settings, self.progress, draft.worker_seconds, launcher=self.endless)


def test_an_interrupt_while_a_candidate_is_asked_stops_what_measures_its_layers(tmp_path: Path) -> None:
    models = Models(tmp_path)
    filling = FillingBench(models.write(), "gptq", models.settings, lambda _: None)
    source = table.source(filling)
    quantized = table.quantized(filling, source)
    image = table.image(filling, quantized)
    baseline = replace(evaluation.baseline(filling, source), inputs={"checkpoint": source.digest})
    bench = InterruptedBench(filling.spec, "gptq", models.settings, lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        evaluation.drift(bench, source, baseline, quantized, image)
    assert bench.endless.was_stopped


def test_fp16_is_asked_anew_where_the_candidate_is_asked_on_another_instruction_set(tmp_path: Path) -> None:
    """As where the image of a pair of another CPU was built anew, and came out with another digest."""
    models = Models(tmp_path)
    bench = models.bench(models.write(), "gptq")
    source = table.source(bench)
    quantized = table.quantized(bench, source)
    image = table.image(bench, quantized)
    told: list[str] = []
    avx2 = replace(bench, instruction_set="avx2", progress=told.append)
    elsewhere = evaluation.baseline(replace(bench, instruction_set="avx512"), source)
    paired = evaluation.drift(avx2, source, elsewhere, quantized, image)
    assert told == ["FP16 was asked on a CPU with avx512: asking it on this one, with avx2"]
    asked = [record["recipe"] for _, record in bench.store.records("answers")]
    assert sorted((each["parameters"]["engine"]["instruction_set"], "image" in each["inputs"]) for each in asked) == [
        ("avx2", False), ("avx2", True), ("avx512", False),
    ]  # fmt: skip
    here = evaluation.baseline(avx2, source)
    assert here.cached
    assert evaluation.drift(avx2, source, here, quantized, image).key == paired.key


def test_a_candidate_is_asked_on_the_cpu_of_fp16_though_another_one_has_asked_it(tmp_path: Path) -> None:
    """FP16 is asked before the image is made, which may come out as the one that was paired elsewhere."""
    models = Models(tmp_path)
    bench = models.bench(models.write(), "gptq")
    source = table.source(bench)
    quantized = table.quantized(bench, source)
    image = table.image(bench, quantized)
    own = bench.settings.cpu.instruction_set
    other = next(each for each in INSTRUCTION_SETS if each != own)
    elsewhere = replace(bench, instruction_set=other)
    evaluation.drift(elsewhere, source, evaluation.baseline(elsewhere, source), quantized, image)
    baseline = evaluation.baseline(replace(bench, instruction_set=own), source)
    evaluation.drift(bench, source, baseline, quantized, image)
    asked = [record["recipe"] for _, record in bench.store.records("answers") if "image" in record["recipe"]["inputs"]]
    assert {recipe["parameters"]["engine"]["instruction_set"] for recipe in asked} == {own, other}
