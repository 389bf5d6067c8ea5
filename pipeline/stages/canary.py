"""The load test's canary where the model's file has none: FP16's own answer, taken once, and locked from then on."""

from __future__ import annotations

from evals.load import canary
from evals.load.plan import LoadPlan
from pipeline.sources.lock import read_lock, write_lock
from pipeline.spec import ModelSpec
from pipeline.stages.context import StageContext
from pipeline.store.artifacts import Artifact


def prompts(spec: ModelSpec) -> list[str]:
    """Return the prompts that FP16 is asked for a canary; none where the model's file has one."""
    return canary.prompts(spec.load.prompts) if spec.load.canary is None else []


def lock(context: StageContext, baseline: Artifact) -> None:
    """Write FP16's canary to the lock, which keeps the one that it has."""
    if context.dry or context.spec.load.canary is not None:
        return
    locked = read_lock(context.spec.lock)
    if locked is None or locked.canary is not None:
        return
    taken = canary.TakenCanary.model_validate(baseline.document(canary.FILE))
    context.progress(taken.warning or f"canary: {taken.prompt!r} is answered {taken.expect!r} by FP16")
    write_lock(locked.model_copy(update={"canary": taken}))


def known(spec: ModelSpec, plan: LoadPlan) -> LoadPlan:
    """Return a plan with the locked canary where it has none of its own; before the first release there is none."""
    locked = read_lock(spec.lock) if plan.canary is None else None
    if locked is None or locked.canary is None:
        return plan
    return plan.model_copy(update={"canary": locked.canary})
