"""The lock of a source, ``models/<name>.lock.json``, beside the model's file.

It is written after the first successful pull and states what every later pull must find::

    {"schema": "slipway/lock/1", "uri": …, "revision": …,
     "files": {PATH: {"size": …, "sha256": …, "version": …}}, "canary": {…}}

A file has a ``version`` where its origin needs one to find it again, such as the version ID of an object. ``canary``
is there where the model's file has no canary of its own (`evals.load.canary`).
While the lock exists, a branch or tag stays at the revision in the lock. The law: a pull that succeeds under a lock has
exactly the bytes that the lock states. To follow the branch, delete the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from evals.load.canary import TakenCanary
from pipeline.errors import SourceError
from registry.atomic_write import write_atomically

_SCHEMA = "slipway/lock/1"


class LockedFile(BaseModel):
    """Size and digest of one file of a lock, and the version under which its origin keeps it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    version: str | None = Field(default=None, max_length=2000, exclude_if=lambda version: version is None)


class Lock(BaseModel):
    """A source as it was first pulled. ``revision`` is a commit or a digest; None for a folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    revision: str | None = Field(pattern=r"^([0-9a-f]{40}|sha256:[0-9a-f]{64})$")
    files: Mapping[str, LockedFile] = Field(min_length=1)
    canary: TakenCanary | None = Field(default=None, exclude_if=lambda canary: canary is None)
    path: Path = Field(exclude=True)

    def refuse_other(self, uri: str, revision: str | None) -> None:
        """Check that this is the lock of ``uri``, and of ``revision`` if one is given.

        Raises:
            SourceError: it is the lock of another source or revision.
        """
        wanted = portable(uri, self.path)
        if self.uri != wanted or (revision and revision != self.revision):
            ours, theirs = (f"{name}@{at}" if at else name
                            for name, at in ((self.uri, self.revision), (wanted, revision)))  # fmt: skip
            raise SourceError(
                f"{self.path} pins {ours}, but the model's file names {theirs}: if that is intended, delete the lock "
                "file "
                "and run again"
            )

    def refuse_difference(self, found: Mapping[str, str | None]) -> None:
        """Compare with the files found (path → sha256, or None if only the name is known yet).

        Raises:
            SourceError: listing all missing, extra and different files.
        """
        problems = [f"{name} is missing" for name in sorted(self.files.keys() - found.keys())]
        problems += [f"{name} is not in the lock" for name in sorted(found.keys() - self.files.keys())]
        problems += [
            f"{name} has sha256 {found[name]}, expected {self.files[name].sha256}"
            for name in sorted(found.keys() & self.files.keys())
            if found[name] not in {None, self.files[name].sha256}
        ]
        if problems:
            raise SourceError(
                f"{self.uri} differs from {self.path}; if the change is intended, delete that file and run again: "
                + "; ".join(problems)
            )


def read_lock(path: Path) -> Lock | None:
    """Return the lock in ``path``, or None if there is no such file.

    Raises:
        SourceError: the file is not a valid lock.
    """
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text())
        schema = document.pop("schema", None)
        if schema != _SCHEMA:
            raise SourceError(f"{path} has schema {schema!r}, but this version of Slipway reads {_SCHEMA!r}")
        return Lock.model_validate({**document, "path": path})
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise SourceError(
            f"{path} is not a valid lock file ({reason}): restore it, or delete it to lock the source again"
        ) from error


def write_lock(lock: Lock) -> None:
    """Write a lock to its path, atomically."""
    write_atomically(lock.path, json.dumps({"schema": _SCHEMA, **lock.model_dump(mode="json")}, indent=2) + "\n")


def portable(uri: str, lock: Path) -> str:
    """A folder's URI relative to the lock file, so that the lock holds in every checkout; any other URI unchanged."""
    if not uri.startswith("file:"):
        return uri
    return "file:" + os.path.relpath(uri.removeprefix("file:"), lock.parent)
