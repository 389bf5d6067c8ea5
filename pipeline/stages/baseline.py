"""The stage `baseline`: what FP16 answers, once for a model, a suite and an engine, whatever the scheme.

Where a server answers, the source is mounted read-only into the runtime that every image of this profile is built on.
"""

from __future__ import annotations

from pipeline.stages import answers, canary
from pipeline.stages.code_version import code_version
from pipeline.stages.context import StageContext
from pipeline.stages.stage import Inputs
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe


def recipe(context: StageContext, inputs: Inputs) -> Recipe:
    """The source and the questions, some of which are asked twice, and the prompts for a canary."""
    source, adapters = inputs["source"], inputs["adapters"]
    taken = {"source": source.digest, "adapters": adapters.digest}
    if context.spec.lacks_baseline:
        return Recipe("answers", taken, {"asked": None}, code=code_version(__name__))
    again = {"again": context.evals.again, "canary": canary.prompts(context.spec)}
    return answers.recipe_of(context, source, answers.reference(context), taken, again, code_version(__name__))


def make(context: StageContext, inputs: Inputs, draft: ArtifactDraft) -> None:
    """Ask FP16, if there is such a model."""
    if context.spec.lacks_baseline:
        return
    source, adapters = inputs["source"], inputs["adapters"]
    with context.device():
        answers.answer(
            context,
            draft,
            source,
            lambda: answers.serve_source(context, source, adapters),
            answers.FP16,
            canary=canary.prompts(context.spec),
        )


def accept(context: StageContext, baseline: Artifact) -> None:
    """Lock the canary on a first release, where the model's file has none."""
    canary.lock(context, baseline)
