"""Moving releases between the local disk and object storage, as settings and models' files allow."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from pipeline.errors import SettingsError, SpecError
from pipeline.settings import Settings
from pipeline.spec import find, load
from registry.catalog import MODEL_TAG, current
from registry.objects import ObjectStore
from registry.progress import Progress
from registry.tiers import TierMove, carry_out, plan_moves


def move(settings: Settings, unused_for: timedelta, progress: Progress, *, yes: bool) -> Sequence[TierMove]:
    """Plan the moves, and make them where ``yes``; return those that are planned, or were made.

    Raises:
        SettingsError: no cold store is configured.
        TrackingError: a store refuses; what was not moved is as it was.
    """
    if settings.cold_store is None:
        raise SettingsError("`SLIPWAY_COLD_STORE` names no store: set it to s3://BUCKET/PREFIX")
    moves = plan_moves(
        settings.tracking_uri, unused_for=unused_for, aliased=lambda name: cold_aliases_allowed(name, settings)
    )
    if not yes:
        return moves
    return carry_out(moves, settings.tracking_uri, ObjectStore.opened(settings.cold_store), progress)


def cold_aliases_allowed(name: str, settings: Settings) -> bool:
    """Whether the model's file of a release line lets its aliased versions be cold; where it can't be read, not."""
    found = current(settings.tracking_uri, name)
    model = found[0].tags.get(MODEL_TAG) if found else None
    if model is None:
        return False
    try:
        return load(find(model, settings.models)).registry.cold_aliases
    except SpecError:
        return False
