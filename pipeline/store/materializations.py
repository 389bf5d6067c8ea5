"""The index of the artifact that each asset's partition has: its stage and key in the store."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline.settings import Settings
from registry.atomic_write import write_atomically

Place = tuple[str, str]
"""A stage, and an artifact's key."""


class MaterializationIndex:
    """One file per asset and partition, written whenever a run made or found its artifact; and when a run began."""

    def __init__(self, settings: Settings) -> None:
        """Open the index of a home."""
        self.folder = settings.home / "dagster" / "handles"

    def path(self, asset: str, partition: str) -> Path:
        """The file of an asset's partition; ``partition`` is ``MODEL|SCHEME``."""
        return self.folder / asset / f"{_file_name(partition)}.json"

    def write(self, asset: str, partition: str, place: Place) -> None:
        """Record the artifact of an asset's partition."""
        path = self.path(asset, partition)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"stage": place[0], "key": place[1]}))

    def begin(self, partition: str) -> None:
        """Record that a run of this partition begins."""
        marker = self._begun(partition)
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()

    def went_through(self, partition: str, made: Mapping[str, Place]) -> bool:
        """Whether the run that began last recorded exactly these artifacts, by asset, up to the last one."""
        if any(self.read(asset, partition) != place for asset, place in made.items()):
            return False
        begun, last = self._begun(partition), self.path(list(made)[-1], partition)
        return begun.exists() and begun.stat().st_mtime_ns <= last.stat().st_mtime_ns

    def read(self, asset: str, partition: str) -> Place | None:
        """Return the stage and key of the artifact in the store; None if none was recorded."""
        try:
            return _place(self.path(asset, partition))
        except FileNotFoundError:
            return None

    def __iter__(self) -> Iterator[Place]:
        """Iterate over all recorded artifacts, of every asset and partition."""
        return map(_place, self.folder.glob("*/*.json"))

    def _begun(self, partition: str) -> Path:
        return self.folder / f"{_file_name(partition)}.begun"


def _file_name(partition: str) -> str:
    return partition.replace("|", "@")


def _place(path: Path) -> Place:
    handle = json.loads(path.read_text())
    return handle["stage"], handle["key"]
