"""Running a stage: its artifact is looked up by its recipe, and made where it is not there."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from pipeline.errors import StoreError
from pipeline.stages.context import StageContext
from pipeline.stages.published import with_published
from pipeline.stages.pulled_adapters import with_adapters
from pipeline.stages.stage import Inputs, Stage
from pipeline.stages.table import BY_NAME
from pipeline.store.artifacts import Artifact


def run(stage: Stage, context: StageContext, inputs: Inputs, *, anew: bool = False) -> Artifact:
    """Return the stage's artifact; make it where the store does not have it, where it is stale, and ``anew``.

    Raises:
        StoreError: the inputs were not made from each other.
        SlipwayError, ContainerError, EvaluationError, RegistryError: the stage fails.
    """
    check_lineage(inputs)
    context = stage.prepare(with_published(with_adapters(context, inputs), inputs), inputs)
    parts = _run_parts(stage, context, inputs) if stage.parts else []
    inputs = {**inputs, **{name: part for lane in parts for name, part in lane.items()}}
    recipe = stage.recipe(context, inputs)
    made = context.store.find(recipe.stage, recipe.key)
    if made and (reason := "measuring again, as asked" if anew else stage.stale(context, made)):
        context.progress(reason)
        context.store.forget(recipe)
        made = None
    if made is None:
        made = context.store.obtain(recipe, lambda draft: stage.make(context, inputs, draft))
    stage.accept(context, made)
    if not parts:
        return made
    return replace(
        made,
        cached=made.cached and all(part.cached for lane in parts for part in lane.values()),
        # The lanes run beside each other, so the longest is what the stage waited for.
        worker_seconds=max(sum(part.worker_seconds for part in lane.values() if not part.cached) for lane in parts),
    )


def run_until(last: str, context: StageContext) -> dict[str, Artifact]:
    """Run the stages that ``last`` needs, and then itself; return their artifacts by stage. Gates are not asked."""
    made: dict[str, Artifact] = {}

    def add(stage: Stage) -> None:
        for name in stage.inputs:
            if name not in made:
                add(BY_NAME[name])
        made[stage.name] = run(stage, context, {name: made[name] for name in stage.inputs})

    add(BY_NAME[last])
    return made


def check_lineage(inputs: Inputs) -> None:
    """Check that artifacts that go together were made from each other: of one checkpoint, of one image.

    Raises:
        StoreError: they were not.
    """
    others = [
        f"`{name}` was not made from the `{of}` that is given with it"
        for name, artifact in inputs.items()
        if name in BY_NAME
        for of in BY_NAME[name].inputs
        if of in inputs and artifact.inputs.get(of) != inputs[of].digest
    ]
    if others:
        raise StoreError(f"{'; '.join(others)}: run every stage again")


def _run_parts(stage: Stage, context: StageContext, inputs: Inputs) -> list[dict[str, Artifact]]:
    """Run the first lane in this thread, which alone hears an interrupt, and the others beside it."""
    first, *others = stage.parts
    with ThreadPoolExecutor(max(len(others), 1)) as pool:
        beside = [pool.submit(_run_lane, lane, context, inputs) for lane in others]
        try:
            return [_run_lane(first, context, inputs), *(each.result() for each in beside)]
        except BaseException:  # Ctrl-C among them: the other lanes must end too
            context.stop.set()
            raise


def _run_lane(lane: Sequence[Stage], context: StageContext, inputs: Inputs) -> dict[str, Artifact]:
    made: dict[str, Artifact] = {}
    for part in lane:
        taken = {**inputs, **made}
        made[part.name] = run(part, context, {name: taken[name] for name in part.inputs})
    return made
