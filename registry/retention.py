"""What a registry keeps, and what may go: versions that no alias, no entry that is not done and no policy needs.

`plan` only looks. `remove` takes the line's turn, looks again, and removes what is still in the plan: the version
first, so that nothing names its files any more, then its logged model and the files. The audit trail stays.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from registry import journal
from registry.backend import Embedded, Version
from registry.cache import unused
from registry.catalog import current, line, names
from registry.tracking import connected, local_folder
from registry.turns import turn

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Doomed:
    """What would go: ``kind`` is ``version`` or ``cached file``; ``bytes`` is 0 where they are not on this machine."""

    kind: str
    name: str
    why: str
    bytes: int
    version: Version | None = None
    path: Path | None = None


def plan(
    tracking_uri: str,
    *,
    keep: int = 5,
    older_than: timedelta = timedelta(days=30),
    cache: Path | None = None,
    now: datetime | None = None,
) -> list[Doomed]:
    """Return what may go: of each line, versions beyond the newest ``keep`` that are older and that nothing refers to.

    A version stays that an alias names, that a begun act is about, or that something else than Slipway registered. Of
    the ``cache`` (see `registry.pull.pull`) files go that no folder on this machine shares.

    Raises:
        TrackingError: The registry can't be reached or read.
    """
    at = now or datetime.now(UTC)
    found = [
        doomed for name in names(tracking_uri) for doomed in _doomed_versions(tracking_uri, name, keep, at - older_than)
    ]
    files = unused(cache) if cache is not None else []
    why = "no pulled release shares it"
    return found + [Doomed("cached file", path.name, why, path.stat().st_size, path=path) for path in files]


def remove(
    doomed: Sequence[Doomed], tracking_uri: str, progress: Callable[[str], None] = lambda _: None
) -> list[Doomed]:
    """Remove what is in the plan and nothing refers to now; return what was removed.

    Raises:
        TrackingError: The registry can't be reached, or refuses.
    """
    removed = []
    by_line: dict[str, list[Doomed]] = {}
    for item in doomed:
        if item.version is not None:
            by_line.setdefault(item.version.name, []).append(item)
        elif item.path is not None and item.path.exists() and item.path.stat().st_nlink == 1:
            item.path.unlink()
            removed.append(item)
    for name, items in by_line.items():
        with turn(tracking_uri, name, progress) as held, connected(tracking_uri) as client:
            for item in items:
                there = {version.version for version in current(tracking_uri, name)} - referred(tracking_uri, name)
                if item.version is None or item.version.version not in there:
                    continue
                held.check()
                _remove_version(client, item.version)
                progress(f"removed {item.name}")
                removed.append(item)
    return removed


def _doomed_versions(tracking_uri: str, name: str, keep: int, before: datetime) -> list[Doomed]:
    needed = referred(tracking_uri, name)
    ours = [version for version in current(tracking_uri, name) if version.manifest_digest is not None]
    return [
        Doomed(
            "version",
            f"{name} version {version.version}",
            f"no alias names it, {keep} newer are kept, it is of {version.created:%Y-%m-%d}",
            _size(version),
            version=version,
        )
        for version in ours[keep:]
        if version.version not in needed and version.created < before
    ]


def referred(tracking_uri: str, name: str) -> set[str]:
    """Return the numbers of the line's versions that an alias names, now or once a begun act is finished."""
    found = line(tracking_uri, name)
    if found is None:
        return set()
    begun = journal.pending(journal.records(found))
    moves = begun.entry.moves if begun is not None else ()
    return set(found.aliases.values()) | {number for move in moves for number in (move.before, move.after) if number}


def _remove_version(client: MlflowClient, version: Version) -> None:
    """Remove the version, then its logged model and run, then its files where they are on this machine.

    Elsewhere MLflow holds the files of a deleted logged model until its own ``mlflow gc`` is run.
    """
    Embedded(client).delete_version(version.name, version.version)
    found = re.search(r"/models/(m-[^/]+)/artifacts/?$", version.location)
    if found is None:
        return
    logged = client.get_logged_model(found[1])
    client.delete_logged_model(logged.model_id)
    if logged.source_run_id:
        client.delete_run(logged.source_run_id)
    folder = local_folder(version.location)
    if folder is not None:
        shutil.rmtree(folder.parent, ignore_errors=True)


def _size(version: Version) -> int:
    folder = local_folder(version.location)
    if folder is None or not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
