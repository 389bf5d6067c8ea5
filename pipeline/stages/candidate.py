"""The candidate's answers, a part of the stage `drift`: of the image that ships where it is served."""

from __future__ import annotations

from pathlib import Path

from evals.drift import asking
from evals.drift.answers import Answers, read_answers
from evals.drift.divergence import read_top
from evals.drift.drift_gate import is_clear, judge
from evals.drift.pairs import compare
from pipeline.stages import answers
from pipeline.stages.code_version import code_version
from pipeline.stages.context import StageContext
from pipeline.stages.stage import Inputs
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe
from pipeline.store.notes import AnswersNotes


def recipe(context: StageContext, inputs: Inputs) -> Recipe:
    """The checkpoint, its image where that is asked, and the questions."""
    limits, quantized = context.evals, inputs["quantized"]
    taken = {"quantized": quantized.digest, "adapters": inputs["adapters"].digest}
    if context.spec.lacks_baseline:
        return Recipe("answers", taken, {"asked": None}, code=code_version(__name__))
    if limits.engine == "served":
        taken["image"] = inputs["image"].digest
    judged = {}
    if limits.looks > 1:
        # The limits and FP16's answers decide when to stop, so with other limits it is asked again.
        taken["baseline"] = inputs["baseline"].digest
        judged = {"looks": limits.looks, "limits": limits.model_dump(mode="json", exclude={"accept_inconclusive"})}
    return answers.recipe_of(context, quantized, context.serving, taken, judged, code_version(__name__))


def make(context: StageContext, inputs: Inputs, draft: ArtifactDraft) -> None:
    """Ask the candidate, in looks where the model's file says so.

    It is not asked where this machine can't serve it, or where there is nothing to compare its answers with.
    """
    if context.spec.lacks_baseline:
        return
    unsupported = context.unsupported_of(inputs["quantized"])
    if unsupported and context.evals.engine == "served":
        draft.note(AnswersNotes(unsupported=unsupported))
        return
    quantized, image_id = inputs["quantized"], answers.image_id_of(inputs["image"])

    def ask_in_looks(ask_part: answers.AskPart) -> None:
        draft.note(AnswersNotes(fraction=_ask_in_looks(context, ask_part, inputs["baseline"], draft)))

    with context.device():
        ask = ask_in_looks if context.evals.looks > 1 else None
        serve = lambda: answers.serve_image(context, image_id, quantized)  # noqa: E731
        answers.answer(context, draft, quantized, serve, image_id, ask)


def _ask_in_looks(context: StageContext, ask_part: answers.AskPart, baseline: Artifact, draft: ArtifactDraft) -> float:
    """Ask until the verdict is clear; return the fraction of the suite that was asked."""
    limits = context.evals

    def is_decided(answered: Answers, folder: Path, fraction: float) -> bool:
        tops = (read_top(baseline.folder), read_top(folder))
        drift = compare(read_answers(baseline.folder), answered, fraction=fraction, tops=tops)
        context.progress(f"a look at {fraction:.0%} of the suite: {judge(drift, limits).reason}")
        return is_clear(drift, limits)

    return asking.in_looks(limits.fractions, ask_part, is_decided, draft.scratch, draft.folder)
