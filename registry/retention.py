"""Retention: removing versions that no alias, no unfinished move and no policy needs.

`plan` only lists. `remove` takes the line's promotion lock, checks again, and removes what is still unneeded: the
version first, so that nothing refers to its files, then the files and the logged model that holds them (the *upload*),
unless another version has the same upload. An upload without a version, left by a killed removal or a promotion that
never finished, is in the next plan. The audit trail stays.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from registry.backend import EXPERIMENT, MANIFEST_TAG, Version
from registry.cache import unused
from registry.catalog import artifact_root, current, line, lines, names
from registry.embedded import Embedded, pages
from registry.locations import checked_folder
from registry.progress import Progress, silent
from registry.promote import discard_upload, line_of
from registry.promotion_lock import hold_promotion_lock
from registry.resolve import referenced_versions
from registry.tracking import connected

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel


@dataclass(frozen=True)
class Removal:
    """A planned removal: ``kind`` is ``version``, ``upload`` or ``cached file``; ``bytes`` is 0 for remote files.

    ``line`` is the release line of a version or an upload, ``model`` the upload's number in MLflow.
    """

    kind: str
    name: str
    why: str
    bytes: int
    line: str | None = None
    version: Version | None = None
    model: str | None = None
    path: Path | None = None


def plan(
    tracking_uri: str,
    *,
    keep: int = 5,
    older_than: timedelta = timedelta(days=30),
    cache: Path | None = None,
    now: datetime | None = None,
) -> list[Removal]:
    """Return what may go: of each line, versions beyond the newest ``keep`` that are older and that nothing refers to.

    A version stays that an alias names, that a begun act is about, or that something else than Slipway registered. With
    them go uploads that are older and that no version has. Of the ``cache`` (see `registry.pull.pull`) files go that no
    folder on this machine shares.

    Raises:
        TrackingError: The registry can't be reached or read.
    """
    before = (now or datetime.now(UTC)) - older_than
    known = names(tracking_uri)
    found = [removal for name in known for removal in _removable_versions(tracking_uri, name, keep, before)]
    if known:
        found += _removable_uploads(tracking_uri, before)
    files = unused(cache) if cache is not None else []
    why = "no pulled release shares it"
    return found + [Removal("cached file", path.name, why, path.stat().st_size, path=path) for path in files]


def remove(removals: Sequence[Removal], tracking_uri: str, progress: Progress = silent) -> list[Removal]:
    """Remove what is in the plan and nothing refers to now; return what was removed.

    Raises:
        TrackingError: The registry can't be reached, or refuses.
    """
    removed = []
    by_line: dict[str, list[Removal]] = {}
    for item in removals:
        if item.line is not None:
            by_line.setdefault(item.line, []).append(item)
        elif item.path is not None and item.path.exists() and item.path.stat().st_nlink == 1:
            item.path.unlink()
            removed.append(item)
    for name, items in by_line.items():
        with hold_promotion_lock(tracking_uri, name, progress) as held, connected(tracking_uri) as client:
            for item in items:
                held.check()
                if not _removed(client, tracking_uri, item):
                    continue
                progress(f"removed {item.name}")
                removed.append(item)
    return removed


def _removable_versions(tracking_uri: str, name: str, keep: int, before: datetime) -> list[Removal]:
    needed = referenced_now(tracking_uri, name)
    root = artifact_root(tracking_uri)
    ours = [version for version in current(tracking_uri, name) if version.manifest_digest is not None]
    return [
        Removal(
            "version",
            f"{name} version {version.version}",
            f"no alias needs it, {keep} newer versions are kept, created {version.created:%Y-%m-%d}",
            _size(version.location, root),
            line=name,
            version=version,
        )
        for version in ours[keep:]
        if version.version not in needed and version.created < before
    ]


def _removable_uploads(tracking_uri: str, before: datetime) -> list[Removal]:
    used = _uploads(tracking_uri)
    with connected(tracking_uri) as client:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            return []
        listed = pages(client.search_logged_models, experiment_ids=[experiment.experiment_id])
    return [
        Removal(
            "upload",
            f"{line_of(model)} {model.model_id}",
            f"no version uses it, created {_created(model):%Y-%m-%d}",
            _size(model.artifact_location, experiment.artifact_location),
            line=line_of(model),
            model=model.model_id,
        )
        for model in listed
        if MANIFEST_TAG in model.tags and model.model_id not in used and _created(model) < before
    ]


def referenced_now(tracking_uri: str, name: str) -> set[str]:
    """Return the numbers of the versions that must stay, read now (`registry.resolve.referenced_versions`)."""
    found = line(tracking_uri, name)
    return set() if found is None else referenced_versions(found)


def _removed(client: MlflowClient, tracking_uri: str, item: Removal) -> bool:
    """Remove a version, and an upload that no version has any more; False where it is gone, or needed by now."""
    version, model = item.version, item.model
    if version is not None:
        there = {found.version for found in current(tracking_uri, version.name)} - referenced_now(
            tracking_uri, version.name
        )
        if version.version not in there:
            return False
        Embedded(client).delete_version(version.name, version.version)
        model = _upload(version)
    if model is None or model in _uploads(tracking_uri):
        return version is not None
    discard_upload(client, client.get_logged_model(model))
    return True


def _uploads(tracking_uri: str) -> set[str | None]:
    """Return the uploads that versions have, of whatever line."""
    return {_upload(version) for version in lines(tracking_uri)}


def _upload(version: Version) -> str | None:
    found = re.search(r"/models/(m-[^/]+)/artifacts/?$", version.location)
    return found[1] if found else None


def _created(model: LoggedModel) -> datetime:
    return datetime.fromtimestamp(model.creation_timestamp / 1000, UTC)


def _size(location: str, root: str | None) -> int:
    folder = checked_folder(location, root)
    if folder is None or not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
