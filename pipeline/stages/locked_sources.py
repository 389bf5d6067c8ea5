"""The sources that a model's locks hold, and which of them are elsewhere no longer what is locked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import SourceError, naming
from pipeline.planner import draft_model
from pipeline.settings import Settings
from pipeline.sources import adapter, dataset
from pipeline.sources import source as sources
from pipeline.sources.contents import DRAFT_MODEL, MODEL, Contents
from pipeline.sources.lock import read_lock
from pipeline.sources.origin import Access, open_origin
from pipeline.spec import ModelSpec


@dataclass(frozen=True)
class LockedSource:
    """A source that the model's file names under ``key``, and its lock."""

    key: str
    uri: str
    revision: str | None
    lock: Path
    contents: Contents


@dataclass(frozen=True)
class Moved:
    """A branch, tag, alias or list of objects that is no longer what its lock holds."""

    source: LockedSource
    locked: str
    now: str

    def __str__(self) -> str:
        """Say where it is now, and how to take that."""
        place = self.source.uri
        return (
            f"`{self.source.key}`: {place} is at {_short(self.now)} now; {self.source.lock.name} holds it at "
            f"{_short(self.locked)}, which is released: to take the new one, `rm {self.source.lock}` and release again"
        )


def locked_sources(spec: ModelSpec) -> Iterator[LockedSource]:
    """Yield the model's source, baseline, adapters, draft model and calibration data; not files of this machine."""
    source = spec.source
    yield LockedSource("source", source.uri, source.revision, spec.lock, MODEL)
    if (baseline := spec.baseline) is not None:
        yield LockedSource("baseline", baseline.uri, baseline.revision, spec.original_lock, MODEL)
    if (merged := source.adapter) is not None:
        lock = adapter.merged_lock_of(spec.lock)
        yield LockedSource("source.adapter", merged.uri, merged.revision, lock, adapter.MERGED)
    for name, served in spec.serve.adapters.items():
        lock = adapter.lock_of(spec.lock, name)
        yield LockedSource(f"serve.adapters.{name}", served.uri, served.revision, lock, adapter.ADAPTER)
    if (found := draft_model.source_of(spec)) is not None:
        key, drafting = found
        yield LockedSource(key, drafting.uri, drafting.revision, draft_model.lock_of(spec.lock), DRAFT_MODEL)
    for number, data in enumerate(spec.calibration.data):
        if not data.is_here:
            lock, contents = dataset.lock_of(spec.lock, number), dataset.dataset(data.files or "")
            yield LockedSource("calibration", data.uri, data.revision, lock, contents)


def find_moved(source: LockedSource, settings: Settings) -> Moved | None:
    """Compare a source with its lock; None where it has none, can't move, or has not moved.

    Raises:
        SourceError: the source can't be asked; names the key.
    """
    with naming(source.key):
        lock, access = read_lock(source.lock), Access.of(settings)
        if lock is None or lock.revision is None:
            return None
        if open_origin(source.uri, source.revision, access).pinned:
            return None
        now = sources.resolve(source.uri, source.revision, access=access, contents=source.contents).revision
        return None if now is None or now == lock.revision else Moved(source, lock.revision, now)


def describe_moved(spec: ModelSpec, settings: Settings) -> Iterator[str]:
    """Yield a line for each source that has moved, or that does not say: its locked bytes may be here all the same."""
    for source in locked_sources(spec):
        try:
            moved = find_moved(source, settings)
        except SourceError as error:
            yield f"can't tell whether a source has changed, and goes on with what is locked: {error}"
            continue
        if moved is not None:
            yield str(moved)


def _short(revision: str) -> str:
    return revision[:19] if revision.startswith("sha256:") else revision[:12]
