"""Moves files of releases between the local disk and object storage, as settings and model files allow."""

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
    """Plan the moves, and carry them out if ``yes``; return the planned or completed ones.

    Raises:
        SettingsError: `SLIPWAY_COLD_STORE` is not set.
        TrackingError: a store refuses; files that were not moved are unchanged.
    """
    if settings.cold_store is None:
        raise SettingsError("`SLIPWAY_COLD_STORE` is not set: set it to s3://BUCKET/PREFIX")
    moves = plan_moves(
        settings.tracking_uri, unused_for=unused_for, aliased=lambda name: cold_aliases_allowed(name, settings)
    )
    if not yes:
        return moves
    return carry_out(moves, settings.tracking_uri, ObjectStore.opened(settings.cold_store), progress)


def cold_aliases_allowed(name: str, settings: Settings) -> bool:
    """Whether the model file of a release line allows aliased versions in cold storage; False if it can't be read."""
    found = current(settings.tracking_uri, name)
    model = found[0].tags.get(MODEL_TAG) if found else None
    if model is None:
        return False
    try:
        return load(find(model, settings.models)).registry.cold_aliases
    except SpecError:
        return False
