"""Which artifact each asset's partition is: what Dagster last made of it, by the store's name and key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline.settings import Settings
from registry.atomic_write import write_atomically

Place = tuple[str, str]
"""A stage, and an artifact's key."""


class MaterializationIndex:
    """A file an asset and partition, written each time that a run has made it or found it made; and when one began."""

    def __init__(self, settings: Settings) -> None:
        """Use the home's."""
        self.folder = settings.home / "dagster" / "handles"

    def path(self, asset: str, partition: str) -> Path:
        """Where it stands which artifact this is; ``partition`` is ``MODEL|SCHEME``."""
        return self.folder / asset / f"{_file_name(partition)}.json"

    def write(self, asset: str, partition: str, place: Place) -> None:
        """Note which artifact this asset's partition is now."""
        path = self.path(asset, partition)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"stage": place[0], "key": place[1]}))

    def begin(self, partition: str) -> None:
        """Note that a run is about to make something of this partition."""
        marker = self._begun(partition)
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()

    def went_through(self, partition: str, made: Mapping[str, Place]) -> bool:
        """Whether whoever began last came by exactly these artifacts, by asset, and got to the last of them."""
        if any(self.read(asset, partition) != place for asset, place in made.items()):
            return False
        begun, last = self._begun(partition), self.path(list(made)[-1], partition)
        return begun.exists() and begun.stat().st_mtime_ns <= last.stat().st_mtime_ns

    def read(self, asset: str, partition: str) -> Place | None:
        """Return the stage and the key by which the store knows the artifact; None where none was made."""
        try:
            return _place(self.path(asset, partition))
        except FileNotFoundError:
            return None

    def __iter__(self) -> Iterator[Place]:
        """Go through all that are noted, of whichever asset and partition."""
        return map(_place, self.folder.glob("*/*.json"))

    def _begun(self, partition: str) -> Path:
        return self.folder / f"{_file_name(partition)}.begun"


def _file_name(partition: str) -> str:
    return partition.replace("|", "@")


def _place(path: Path) -> Place:
    handle = json.loads(path.read_text())
    return handle["stage"], handle["key"]
