"""Storage tiers: large files of unused versions, in object storage by digest instead of on the local disk.

A version's folder is `…/m-ID/artifacts`; beside it, `cold.json` says which of its files are elsewhere::

    {"schema": "slipway.cold/v1", "store": "s3://BUCKET/PREFIX", "files": {NAME: {"sha256": …, "size": …}}}

The laws, which hold at every moment, so that an interrupted move loses nothing and a pull never fails for one:

- a file that `cold.json` names is in the store, read back and found to have its digest, before it is named;
- a local file goes only after it is named, and the name goes only after the local file is back, with its digest;
- so each file is readable in one place at least; where it is in both, the local one is read.

Objects are named by their content (`registry.objects`): two versions with the same file share one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from registry import untrusted
from registry.backend import Version
from registry.catalog import artifact_root, current, names
from registry.cold_files import LARGEST_MARKER, MARKER, cold_files, write_marker
from registry.errors import ManifestError, TrackingError, UntrustedFileError
from registry.locations import checked, checked_folder
from registry.manifest import MANIFEST, Manifest
from registry.objects import ObjectStore, digest_local
from registry.progress import Progress
from registry.promotion_lock import hold_promotion_lock
from registry.retention import referenced_now
from registry.tracking import local_folder

# Smaller files stay: manifests, tokenizers and evidence are what one looks at.
LEAST_BYTES = 1 << 20


@dataclass(frozen=True)
class TierMove:
    """One version to move: ``to`` is ``cold`` or ``hot``; ``bytes`` are what is freed here, or fetched.

    ``aliased`` says that it may be cold with an alias too.
    """

    version: Version
    to: str
    why: str
    bytes: int
    aliased: bool = False

    @property
    def name(self) -> str:
        """The version, as a person names it."""
        return f"{self.version.name} version {self.version.version}"


def cool(version: Version, store: ObjectStore, progress: Progress, least: int = LEAST_BYTES) -> int:
    """Move a version's large files to the store; return how many bytes that freed here.

    Raises:
        TrackingError: a file is not what the manifest says, or the store refuses; nothing was removed.
    """
    folder = _folder(version)
    where, _ = cold_files(folder)
    if where not in {"", store.uri}:
        warm(version, store, progress)  # what only another store has comes here first
    _, before = cold_files(folder)
    manifest = _manifest(version, folder)
    chosen = {name: record for name, record in manifest.files.items() if record.size >= least}
    for name, record in chosen.items():
        path = folder / name
        if name in before and not path.exists():
            continue
        if digest_local(path) != record.sha256:
            raise TrackingError(f"`{path}` differs from the manifest: it is not moved")
        progress(f"{version.name} version {version.version}: {name}, {record.size / 1e6:.1f} MB")
        store.put(path, record)
    if not chosen:
        return 0
    write_marker(folder, store.uri, {**before, **chosen})
    freed = 0
    for name, record in chosen.items():
        if (folder / name).exists():
            (folder / name).unlink()
            freed += record.size
    return freed


def warm(version: Version, store: ObjectStore, progress: Progress) -> int:
    """Bring a version's cold files back, from ``store`` or the one that they were moved to; return the bytes fetched.

    Raises:
        TrackingError: the store refuses, or holds something else; what is cold stays so.
    """
    folder = _folder(version)
    where, cold = cold_files(folder)
    if where not in {"", store.uri}:
        store = ObjectStore.opened(where)
    signed = _manifest(version, folder).files if cold else {}
    if odd := sorted(name for name, record in cold.items() if signed.get(name) != record):
        raise TrackingError(f"`{folder.parent / MARKER}` names `{odd[0]}`, which differs from the manifest")
    fetched = 0
    for name, record in cold.items():
        if (folder / name).exists():
            continue
        progress(f"{version.name} version {version.version}: {name}, {record.size / 1e6:.1f} MB")
        # Beside the folder, whose files are all of the release: half a file there would be one too many.
        beside = folder.parent / f"warming-{record.sha256}"
        store.get(record, beside)
        within, _, last = name.rpartition("/")
        with untrusted.folder_handle(folder, within=within or ".", make=True) as handle:
            os.replace(beside, last, dst_dir_fd=handle)
        fetched += record.size
    (folder.parent / MARKER).unlink(missing_ok=True)
    return fetched


def plan_moves(
    tracking_uri: str,
    *,
    unused_for: timedelta,
    aliased: bool | Callable[[str], bool] = False,
    now: datetime | None = None,
    least: int = LEAST_BYTES,
) -> list[TierMove]:
    """Say which versions on this machine are to move: the unused to the cold, what an alias needs back.

    The last use is the newest time at which a large file was read, as the file system keeps it (with `relatime`, to a
    day), or the version's own. ``aliased`` says whether versions with an alias may be cold too, by their line's name.
    """
    at = now or datetime.now(UTC)
    moves = []
    root = artifact_root(tracking_uri)
    for name in names(tracking_uri):
        needed = referenced_now(tracking_uri, name)
        may = aliased if isinstance(aliased, bool) else aliased(name)
        for version in current(tracking_uri, name):
            folder = checked_folder(version.location, root)
            if folder is None or version.manifest_digest is None or not folder.is_dir():
                continue
            keep = version.version in needed and not may
            cold = [record for file, record in cold_files(folder)[1].items() if not (folder / file).exists()]
            if cold and keep:
                moves.append(TierMove(version, "hot", "an alias names it", sum(record.size for record in cold)))
                continue
            large = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size >= least]
            used = max([version.created, *(_used(path) for path in large)])
            if large and not keep and at - used >= unused_for:
                size = sum(path.stat().st_size for path in large)
                why = "no alias needs it here" if version.version not in needed else "aliased versions may be cold"
                moves.append(TierMove(version, "cold", f"last used {used:%Y-%m-%d}, {why}", size, aliased=may))
    return moves


def carry_out(
    moves: list[TierMove], tracking_uri: str, store: ObjectStore, progress: Progress, least: int = LEAST_BYTES
) -> list[TierMove]:
    """Make the moves, holding each line's promotion lock so that no alias moves; return those that were made.

    Raises:
        TrackingError: a store refuses; what was not moved is as it was.
    """
    made = []
    for move in moves:
        with hold_promotion_lock(tracking_uri, move.version.name, progress) as held:
            held.check()
            checked(move.version.location, tracking_uri)
            needed = move.version.version in referenced_now(tracking_uri, move.version.name)
            if move.to == "cold" and needed and not move.aliased:
                progress(f"{move.name} has an alias now and stays on the local disk")
                continue
            if move.to == "cold":
                cool(move.version, store, progress, least)
            else:
                warm(move.version, store, progress)
            made.append(move)
    return made


def _folder(version: Version) -> Path:
    folder = local_folder(version.location)
    if folder is None or not folder.is_dir():
        raise TrackingError(f"{version.name} version {version.version} is not in a folder of this machine")
    return folder


def _manifest(version: Version, folder: Path) -> Manifest:
    try:
        manifest = Manifest.parse(untrusted.read(folder, MANIFEST, LARGEST_MARKER))
    except (OSError, ManifestError, UntrustedFileError) as error:
        raise TrackingError(f"{version.name} version {version.version} has no readable manifest: {error}") from error
    if manifest.digest != version.manifest_digest:
        raise TrackingError(f"{version.name} version {version.version} is not what was registered: it is not moved")
    return manifest


def _used(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_atime, UTC)
