"""The stage `drift`: the candidate's answers, paired with FP16's."""

from __future__ import annotations

from typing import Literal

from containers.sandbox.kernels import ComputedOn
from evals.drift import asking, drift_gate
from evals.drift.answers import read_answers
from evals.drift.divergence import read_top
from evals.drift.pairs import compare, not_asked, read_drift, read_layers, write_drift
from evals.errors import AnswersError
from pipeline.stages.code_version import code_version
from pipeline.stages.context import StageContext
from pipeline.stages.layers import calibration_texts
from pipeline.stages.stage import Inputs, digests
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe
from pipeline.store.notes import AnswersNotes
from registry.digests import digest_file
from registry.verdict import Verdict


def recipe(context: StageContext, inputs: Inputs) -> Recipe:
    """Both sides' answers, the layers' errors, and the calibration text, which items of the suite may overlap."""
    calibration = context.calibration
    return Recipe(
        "drift",
        inputs=digests(inputs),
        parameters={}
        if calibration is None
        else {"calibration": digest_file(calibration.uri), "samples": calibration.samples},
        code=code_version(__name__),
    )


def make(context: StageContext, inputs: Inputs, draft: ArtifactDraft) -> None:
    """Pair the answers."""
    baseline, candidate = inputs["baseline"], inputs["candidate"]
    lacking = candidate.noted(AnswersNotes).unsupported
    if lacking is not None:
        write_drift(not_asked(lacking), draft.folder)
        return
    try:
        answered = read_answers(candidate.folder)
        compared = compare(
            read_answers(baseline.folder),
            answered,
            fraction=candidate.noted(AnswersNotes).fraction,
            overlapping=asking.overlapping(answered, candidate.folder, calibration_texts(context)),
            tops=(read_top(baseline.folder), read_top(candidate.folder)),
            layers=read_layers(inputs["layers"].folder),
            computed_on=_computed_on(baseline, candidate),
        )
    except AnswersError as error:
        # A data set that changed upstream does not change the answers' key, so a second run would find them again.
        kept = f"{baseline.folder.parent} and {candidate.folder.parent}"
        raise AnswersError(f"{error} (the answers are in {kept}: remove them, and run again)") from error
    write_drift(compared, draft.folder)


def judge(drift: Artifact, context: StageContext) -> Verdict:
    """Compare what was lost with the model's limits."""
    return drift_gate.judge(read_drift(drift.folder), context.evals)


def _computed_on(baseline: Artifact, candidate: Artifact) -> dict[Literal["FP16", "candidate"], ComputedOn]:
    sides: dict[Literal["FP16", "candidate"], Artifact] = {"FP16": baseline, "candidate": candidate}
    return {
        side: computed_on
        for side, answers in sides.items()
        if (computed_on := answers.noted(AnswersNotes).computed_on) is not None
    }
