"""What was made, looked at without making anything: a store and a bench for dry runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.errors import SlipwayError
from pipeline.stages.table import StageContext
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe, Store


class NotMade(SlipwayError):
    """A recipe's artifact is not there; ``again`` where it is, and a run would make it once more."""

    def __init__(self, recipe: Recipe, *, again: bool = False) -> None:
        self.recipe = recipe
        self.again = again
        super().__init__(f"`{recipe.stage}` is not made")


class ReadOnlyStore(Store):
    """What was made, and nothing else: what is not there is `NotMade`."""

    def obtain(self, recipe: Recipe, make: Callable[[ArtifactDraft], None]) -> Artifact:  # noqa: ARG002 - as the store's
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
class ReadOnlyContext(StageContext):
    """A bench at which nothing is made."""

    @property
    def store(self) -> ReadOnlyStore:
        """What was made."""
        return ReadOnlyStore(self.settings.home / "artifacts")
