"""The stage `variants`: further ways to serve the image, each through drift and load like the main configuration.

A variant that does not pass does not hold the release up: the manifest lists those that passed, and nothing else can be
started. FP16's answers are those of the main configuration, unless the variant changes what FP16 is asked.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from containers.errors import ContainerError
from containers.image import profile as profiles
from evals.drift.answers import read_answers
from evals.errors import EvaluationError
from evals.load import load_test
from evals.load import variants as documents
from evals.load.evidence import read_load_evidence
from pipeline.stages import answers, baseline, candidate, drift, layers, load
from pipeline.stages.code_version import code_version
from pipeline.stages.context import StageContext
from pipeline.stages.stage import Inputs, digests
from pipeline.stages.tested_variants import EVIDENCE, FAILED, SERVING, judged
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe


def recipe(context: StageContext, inputs: Inputs) -> Recipe:
    """For each variant, what determines its answers and its load test."""
    measured = {
        name: {
            "serving": own.serving.document(),
            "fp16": baseline.recipe(own, inputs).key,
            "candidate": candidate.recipe(own, inputs).key,
            "load": load.recipe(own, _only(inputs, "quantized", "adapters", "image")).key,
        }
        for name in context.variants
        for own in [replace(context, variant=name)]
    }
    return Recipe("variants", inputs=digests(inputs), parameters=measured, code=code_version(__name__))


def make(context: StageContext, inputs: Inputs, draft: ArtifactDraft) -> None:
    """Measure each variant, and keep its evidence in a folder of its own."""
    profile, config = profiles.load(context.spec.runtime), inputs["quantized"].document("config.json")
    for name in context.variants:
        own = replace(context, variant=name)
        folder = draft.folder / documents.folder(name)
        folder.mkdir(parents=True)
        (folder / SERVING).write_text(own.serving.resolved(config, profile).model_dump_json(indent=1))
        try:
            made = _measured(own, inputs)
        except (ContainerError, EvaluationError) as error:
            # The release does not depend on a variant; the next run tries this one again.
            context.progress(f"variant `{name}` could not be measured: {error}")
            (folder / FAILED).write_text(str(error), encoding="utf-8")
            continue
        draft.worker_seconds.extend(each.worker_seconds for each in made.values() if not each.cached)
        for file, stage in EVIDENCE.items():
            shutil.copyfile(made[stage].folder / file, folder / file)


def stale(context: StageContext, variants: Artifact) -> str | None:
    """Say which variants decide nothing yet: they could not be measured, or their load test was disturbed."""
    undecided = [f"`{name}`" for name in context.variants if _is_undecided(context, variants.folder, name)]
    return f"nothing is decided about variant {', '.join(undecided)}: measuring again" if undecided else None


def accept(context: StageContext, variants: Artifact) -> None:
    """Say which variants are listed, and why others are not."""
    for variant in judged(variants, context):
        context.progress(str(variant))


def _is_undecided(context: StageContext, folder: Path, name: str) -> bool:
    place = folder / documents.folder(name)
    if (place / FAILED).exists():
        return True
    found = read_load_evidence(place)
    return not found.unsupported and not load_test.is_conclusive(found, context.spec.load)


def _measured(context: StageContext, inputs: Inputs) -> dict[str, Artifact]:
    """Return the drift and the load test of a variant, made where they are not there."""
    fp16 = _fp16(context, inputs)
    asked = {**inputs, "baseline": fp16}
    answered = _obtain(candidate, context, asked)
    errors = _obtain(layers, context, inputs)
    compared = _obtain(drift, context, {**asked, "candidate": answered, "layers": errors})
    return {"drift": compared, "load": _obtain(load, context, _only(inputs, "quantized", "adapters", "image"))}


def _fp16(context: StageContext, inputs: Inputs) -> Artifact:
    """Return FP16's answers: those of the main configuration, unless the variant changes what is asked or how.

    Another context changes nothing where every prompt fits both.
    """
    main = replace(context, variant=None)
    answered = _obtain(baseline, main, inputs)
    if context.spec.lacks_baseline:
        return answered
    config, profile = inputs["source"].document("config.json"), profiles.load(context.spec.runtime)
    ours, theirs = (answers.reference(each).answering().resolved(config, profile) for each in (context, main))
    longest = read_answers(answered.folder).longest
    fits = longest is not None and longest <= min(ours.context or 0, theirs.context or 0)
    if fits and ours.model_copy(update={"context": theirs.context}) == theirs and context.evals == main.evals:
        return answered
    return _obtain(baseline, context, inputs)


def _obtain(stage: ModuleType, context: StageContext, inputs: Inputs) -> Artifact:
    """Return a stage's artifact for a variant; made where it is not there, or decides nothing."""
    recipe: Recipe = stage.recipe(context, inputs)
    found = context.store.find(recipe.stage, recipe.key)
    if found is not None and stage is load and load.stale(context, found):
        context.store.forget(recipe)
    return context.store.obtain(recipe, lambda draft: stage.make(context, inputs, draft))


def _only(inputs: Inputs, *names: str) -> dict[str, Artifact]:
    return {name: inputs[name] for name in names}
