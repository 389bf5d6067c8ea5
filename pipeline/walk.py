"""A release walked as a run goes through it, on a shelf that hands out what was made before and makes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline import evaluation, promotion, stages
from pipeline.errors import SlipwayError
from pipeline.stages import Bench
from pipeline.store import Artifact, Making, Recipe, Store
from registry.verdict import Verdict


class NotMade(SlipwayError):
    """A recipe's artifact is not there; ``again`` where it is, and a run would make it once more."""

    def __init__(self, recipe: Recipe, *, again: bool = False) -> None:
        self.recipe = recipe
        self.again = again
        super().__init__(f"`{recipe.stage}` is not made")


class Shelf(Store):
    """What was made, and nothing else: what is not there is `NotMade`."""

    def obtain(self, recipe: Recipe, make: Callable[[Making], None]) -> Artifact:  # noqa: ARG002 - as the store's
        """Return what was made by the recipe."""
        found = self.made_by(recipe)
        if found is None:
            raise NotMade(recipe)
        return found

    def made_by(self, recipe: Recipe) -> Artifact | None:
        """Return what was made by the recipe, or by one that is as good."""
        return self.find(recipe.stage, recipe.key)

    def forget(self, recipe: Recipe) -> None:
        """Say that a run would make this again."""
        raise NotMade(recipe, again=True)


@dataclass(frozen=True)
class ShelfBench(Bench):
    """A bench at which nothing is made."""

    @property
    def store(self) -> Shelf:
        """What was made."""
        return Shelf(self.settings.home / "artifacts")


def walk(bench: Bench) -> Iterator[tuple[str, Artifact | Verdict]]:
    """Go through a release as its run does: each stage's artifact, and each gate's verdict behind its evidence.

    The last is the signed release, or the verdict of a gate that refuses what is there.
    """
    yield "source", (source := stages.source(bench))
    yield "quantized", (quantized := stages.quantized(bench, source))
    yield "image", (image := stages.image(bench, quantized))
    yield "baseline", (baseline := evaluation.baseline(bench, source))
    yield "drift", (drift := evaluation.drift(bench, source, baseline, quantized, image))
    yield "drift", (judged := bench.verdict("drift", drift))
    if judged.blocks:
        return
    yield "scan", (scan := stages.scan(bench, image, quantized))
    yield "scan", (judged := bench.verdict("scan", scan))
    if judged.blocks:
        return
    yield "load", (load := stages.load(bench, image, quantized))
    yield "load", (judged := bench.verdict("load", load))
    if judged.blocks:
        return
    yield "release", promotion.sealed(bench, source, quantized, drift, image, scan, load)


def signed(bench: Bench) -> Artifact | None:
    """Walk to the end; return the signed release, or None where a gate refuses what is there."""
    *_, (_, last) = walk(bench)
    return last if isinstance(last, Artifact) else None
