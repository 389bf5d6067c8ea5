"""A dry run of a release: every recipe is computed and looked up in the store, and nothing is made or written.

One thing is remembered: the digests of a folder's files, so that the next look need not read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.stages.context import StageContext
from pipeline.stages.published import with_published
from pipeline.stages.pulled_adapters import with_adapters
from pipeline.stages.stage import Gate, Inputs, Stage
from pipeline.stages.table import STAGES
from pipeline.store.artifacts import Artifact, Recipe, Store
from registry.verdict import Verdict


@dataclass(frozen=True)
class Missing:
    """What a run would make. ``stale`` says why, where the store has it and a run would make it again."""

    recipe: Recipe
    stale: str | None = None


class DryRun:
    """Goes through a release as its run does."""

    def __init__(self, context: StageContext) -> None:
        """Look up artifacts in the home of ``context``, and not in storage that homes share."""
        self.context = replace(context, dry=True)
        self.store = Store(context.settings.home / "artifacts")

    def __iter__(self) -> Iterator[tuple[str, Artifact | Missing | Verdict]]:
        """Yield each stage's artifact, and its gate's verdict after it, by the stage's name.

        The last is the signed release, a missing artifact, or the verdict of a gate that blocks.
        """
        made: dict[str, Artifact] = {}
        verdicts: dict[str, Verdict] = {}
        for stage in STAGES:
            context = replace(self.context, verdicts=verdicts)
            found = self.look_up(stage, {name: made[name] for name in stage.inputs}, context)
            yield stage.name, found
            if isinstance(found, Missing):
                return
            made[stage.name] = found
            if stage.gate is not None:
                verdict = verdicts[stage.name] = self.judge(stage.name, stage.gate, found)
                yield stage.name, verdict
                if verdict.blocks:
                    return

    def last(self) -> Artifact | Missing | Verdict:
        """Return how far the release comes: the last of what is yielded."""
        *_, (_, last) = self
        return last

    def look_up(self, stage: Stage, inputs: Inputs, context: StageContext) -> Artifact | Missing:
        """Return a stage's artifact, or what is missing of it or of its parts."""
        context = stage.prepare(with_published(with_adapters(context, inputs), inputs), inputs)
        taken = dict(inputs)
        for part in (part for lane in stage.parts for part in lane):
            found = self.look_up(part, {name: taken[name] for name in part.inputs}, context)
            if isinstance(found, Missing):
                return found
            taken[part.name] = found
        recipe = stage.recipe(context, taken)
        artifact = self.find(recipe)
        if artifact is None:
            return Missing(recipe)
        if reason := self.stale(stage, artifact):
            return Missing(recipe, reason)
        stage.accept(context, artifact)
        return artifact

    def find(self, recipe: Recipe) -> Artifact | None:
        """Return the artifact of a recipe."""
        return self.store.find(recipe.stage, recipe.key)

    def stale(self, stage: Stage, artifact: Artifact) -> str | None:
        """Say why a run would make an artifact again."""
        return stage.stale(self.context, artifact)

    def judge(self, _stage: str, gate: Gate, evidence: Artifact) -> Verdict:
        """Judge as a run would."""
        return gate.judge(evidence, self.context)
