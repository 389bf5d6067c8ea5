"""The evaluation's part of a plan: its tasks, and the losses that it detects."""

from __future__ import annotations

from evals.drift import planning
from pipeline.compatibility.description import ModelDescription
from pipeline.errors import UnsupportedModelError
from pipeline.planner.document import EvaluatedTask, PlannedEvaluation
from pipeline.spec import ModelSpec


def evaluation(spec: ModelSpec) -> PlannedEvaluation:
    """The tasks, their tokens per model, and the losses that they detect with 80% power."""
    limits = spec.evals
    tasks = planning.plan(limits)
    return PlannedEvaluation(
        suite=limits.name,
        digest=limits.digest,
        engine=limits.engine,
        confidence=limits.confidence,
        power=planning.POWER,
        items=sum(task.items for task in tasks),
        tokens=sum(task.tokens for task in tasks),
        tasks=tuple(
            EvaluatedTask(
                name=task.name,
                tier=task.tier,
                kind=task.kind,
                items=task.items,
                groups=task.groups,
                tokens=task.tokens,
                limit=task.limit,
                detectable=dict(zip(map(str, planning.FLIPS), task.detectable, strict=True))
                if task.kind != "text"
                else task.detectable[0],
                items_wanted=task.wanted,
                can_decide=task.can_decide,
            )
            for task in tasks
        ),
    )


def check_images(spec: ModelSpec, model: ModelDescription) -> None:
    """Check that a model that is asked about images accepts them.

    Raises:
        UnsupportedModelError: it does not; the message names the task's key.
    """
    if model.accepts_images:
        return
    if shown := spec.evals.image_tasks:
        raise UnsupportedModelError(
            f"`{shown[0]}` asks about images, and the model accepts none: its config.json ({model.architecture}) has "
            "neither `vision_config` nor a token for images: leave the task out"
        )
