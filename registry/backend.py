"""The operations on MLflow's model registry that Slipway needs, and what they return.

There are two implementations: `registry.server` talks to an MLflow server by its REST API and does not import MLflow;
`registry.embedded` opens any other store (SQLite, a database) through MLflow itself. `registry.connect` chooses.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from registry.errors import TrackingError

if TYPE_CHECKING:
    pass

MANIFEST_TAG = "slipway.manifest_digest"
MODEL_TAG = "slipway.model"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
EXPERIMENT = "slipway"
"""The MLflow experiment that releases are uploaded to."""
LOCK_PREFIX = "slipway-turns."
"""The prefix of the registered models that serve as promotion locks (`registry.promotion_lock`), not release lines."""


@dataclass(frozen=True)
class Version:
    """One accepted release: ``location`` is where its files are, ``created`` is UTC."""

    name: str
    version: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    location: str
    created: datetime

    @property
    def manifest_digest(self) -> str | None:
        """The digest of the signed manifest; None where something else registered this version.

        A tag can hold any text; one that is not a digest counts as absent.
        """
        digest = self.tags.get(MANIFEST_TAG, "")
        return digest if _DIGEST.fullmatch(digest) else None


@dataclass(frozen=True)
class Line:
    """A release line: which version each alias names, and the line's own tags."""

    name: str
    aliases: Mapping[str, str]
    tags: Mapping[str, str]


class RegistryBackend(Protocol):
    """The operations; each is atomic in MLflow and raises ``TrackingError`` if MLflow refuses it."""

    def artifact_root(self) -> str | None:
        """Where the experiment `EXPERIMENT` keeps its files; None if the experiment does not exist."""
        ...

    def names(self) -> list[str]:
        """Every registered model's name, sorted."""
        ...

    def line(self, name: str) -> Line | None:
        """The line, or None."""
        ...

    def versions(self, name: str) -> list[Version]:
        """Its versions, newest first."""
        ...

    def version(self, name: str, number: str) -> Version | None:
        """One version without its aliases, or None."""
        ...

    def create_line(self, name: str, tags: Mapping[str, str]) -> None:
        """Make a registered model; do nothing if it exists."""
        ...

    def create_version(self, name: str, source: str, tags: Mapping[str, str]) -> str:
        """Make a version; its number is unique and larger than all before."""
        ...

    def delete_version(self, name: str, version: str) -> None:
        """Delete a version; do nothing if it does not exist. Its number is never reused."""
        ...

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Point the alias at the version."""
        ...

    def delete_alias(self, name: str, alias: str) -> None:
        """Remove the alias."""
        ...

    def set_line_tag(self, name: str, key: str, value: str) -> None:
        """Set a tag of the line."""
        ...

    def set_version_tag(self, name: str, version: str, key: str, value: str) -> None:
        """Set a tag of a version."""
        ...


def aliases_by_version(line: Line) -> defaultdict[str, tuple[str, ...]]:
    """Return the sorted aliases of each version; of one without any, none."""
    found: defaultdict[str, tuple[str, ...]] = defaultdict(tuple)
    for alias, number in sorted(line.aliases.items()):
        found[number] += (alias,)
    return found


def only_version(backend: RegistryBackend, name: str, number: str) -> Version:
    """Return the version with this number.

    Raises:
        TrackingError: There is none; the message lists the line's versions.
    """
    versions = backend.versions(name)
    for version in versions:
        if version.version == number:
            return version
    there = ", ".join(version.version for version in reversed(versions)) or "none"
    raise TrackingError(f"`{name}` has no version {number} (there is: {there})")
