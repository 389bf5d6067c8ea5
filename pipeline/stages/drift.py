"""The stage `drift`: the candidate's answers, paired with FP16's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from containers.sandbox.kernels import ComputedOn
from evals.drift import asking, drift_gate
from evals.drift.answers import read_answers
from evals.drift.divergence import read_top
from evals.drift.pairs import Drift, compare, not_asked, not_compared, read_drift, read_layers, write_drift
from evals.errors import AnswersError
from pipeline.quantization import calibration_data
from pipeline.stages import calibration
from pipeline.stages.answers import adapter_folder
from pipeline.stages.code_version import code_version
from pipeline.stages.context import StageContext
from pipeline.stages.stage import Inputs, digests
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe
from pipeline.store.notes import AnswersNotes
from registry.verdict import Verdict


def recipe(context: StageContext, inputs: Inputs) -> Recipe:
    """Both sides' answers, the layers' errors, and the calibration text, which items of the suite may overlap."""
    text = context.calibration
    return Recipe(
        "drift",
        inputs=digests(inputs),
        parameters={} if text is None else {"calibration": calibration.digest(context), "samples": text.samples},
        code=code_version(__name__),
    )


def make(context: StageContext, inputs: Inputs, draft: ArtifactDraft) -> None:
    """Pair the answers."""
    if context.spec.lacks_baseline:
        write_drift(not_compared("the model file names no `baseline` to compare the source with"), draft.folder)
        return
    baseline, candidate = inputs["baseline"], inputs["candidate"]
    lacking = candidate.noted(AnswersNotes).unsupported
    if lacking is not None:
        write_drift(not_asked(lacking), draft.folder)
        return
    samples = [] if context.calibration is None else calibration.samples(context)
    texts = list(calibration_data.texts(samples))
    try:
        compared = _compare(
            baseline.folder,
            candidate.folder,
            texts,
            fraction=candidate.noted(AnswersNotes).fraction,
            layers=read_layers(inputs["layers"].folder),
            computed_on=_computed_on(baseline, candidate),
            not_computed=context.scheme.quantized_at_run_time if context.evals.engine == "hf" else (),
            adapters={
                name: _compare(adapter_folder(baseline.folder, name), adapter_folder(candidate.folder, name), texts)
                for name in context.spec.serve.adapters
            },
        )
    except AnswersError as error:
        # A data set that changed upstream does not change the answers' key, so a second run would find them again.
        kept = f"{baseline.folder.parent} and {candidate.folder.parent}"
        raise AnswersError(f"{error} (the answers are in {kept}: remove them, and run again)") from error
    write_drift(compared, draft.folder)


def judge(drift: Artifact, context: StageContext) -> Verdict:
    """Compare what was lost with the model's limits."""
    return drift_gate.judge(read_drift(drift.folder), context.evals, context.spec.serve.adapters)


def _compare(baseline: Path, candidate: Path, calibration: Sequence[str], **more: Any) -> Drift:  # noqa: ANN401 - as `compare`
    """Pair the answers in two folders."""
    answered = read_answers(candidate)
    overlapping = asking.overlapping(answered, candidate, calibration)
    tops = (read_top(baseline), read_top(candidate))
    return compare(read_answers(baseline), answered, overlapping=overlapping, tops=tops, **more)


def _computed_on(baseline: Artifact, candidate: Artifact) -> dict[Literal["FP16", "candidate"], ComputedOn]:
    sides: dict[Literal["FP16", "candidate"], Artifact] = {"FP16": baseline, "candidate": candidate}
    return {
        side: computed_on
        for side, answers in sides.items()
        if (computed_on := answers.noted(AnswersNotes).computed_on) is not None
    }
