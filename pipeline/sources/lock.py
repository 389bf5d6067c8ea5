"""The lock of a source, ``models/<name>.lock.json``, beside the model's file.

It is written after the first good pull and says what every later one must find::

    {"schema": "slipway/lock/1", "uri": …, "revision": …, "files": {PATH: {"size": …, "sha256": …}}}

While it exists, a branch stays at the commit that it names. The law: a pull that succeeds under a lock has exactly the
bytes of the lock. To move on, delete the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import SourceError
from registry.atomic_write import write_atomically

_SCHEMA = "slipway/lock/1"


class LockedFile(BaseModel):
    """What a lock says of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Lock(BaseModel):
    """A source as it was when it was first pulled. ``revision`` is a hub's commit, None for a folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    revision: str | None = Field(pattern=r"^[0-9a-f]{40}$")
    files: Mapping[str, LockedFile] = Field(min_length=1)
    path: Path = Field(exclude=True)

    def refuse_other(self, uri: str, commit: str | None) -> None:
        """Check that this is the lock of ``uri``, and of ``commit`` where one is asked for.

        Raises:
            SourceError: it is another's.
        """
        wanted = portable(uri, self.path)
        if self.uri != wanted or (commit and commit != self.revision):
            ours, theirs = (f"{name}@{revision}" if revision else name
                            for name, revision in ((self.uri, self.revision), (wanted, commit)))  # fmt: skip
            raise SourceError(
                f"{self.path} pins {ours}, and the model's file says {theirs}: if that is meant, delete the lock file "
                "and run again"
            )

    def refuse_difference(self, found: Mapping[str, str | None]) -> None:
        """Compare with the files found (path → sha256, or None where only the name is known yet).

        Raises:
            SourceError: listing all that is missing, extra and different.
        """
        problems = [f"{name} is missing" for name in sorted(self.files.keys() - found.keys())]
        problems += [f"{name} is not in the lock" for name in sorted(found.keys() - self.files.keys())]
        problems += [
            f"{name} has sha256 {found[name]}, the lock says {self.files[name].sha256}"
            for name in sorted(found.keys() & self.files.keys())
            if found[name] not in {None, self.files[name].sha256}
        ]
        if problems:
            raise SourceError(
                f"{self.uri} is not what {self.path} pins; if the change is meant, delete that file and run again: "
                + "; ".join(problems)
            )


def read_lock(path: Path) -> Lock | None:
    """Return the lock in ``path``, or None where there is none.

    Raises:
        SourceError: it is no lock.
    """
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text())
        schema = document.pop("schema", None)
        if schema != _SCHEMA:
            raise SourceError(f"{path} has schema {schema!r}, and this version of Slipway knows {_SCHEMA!r}")
        return Lock.model_validate({**document, "path": path})
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise SourceError(f"{path} is no lock file ({reason}): restore it, or delete it to lock anew") from error


def write_lock(lock: Lock) -> None:
    """Write a lock to its path, whole or not at all."""
    write_atomically(lock.path, json.dumps({"schema": _SCHEMA, **lock.model_dump(mode="json")}, indent=2) + "\n")


def portable(uri: str, lock: Path) -> str:
    """A folder as it is seen from the lock file, so that the lock holds in every checkout; a hub's URI as it is."""
    if not uri.startswith("file:"):
        return uri
    return "file:" + os.path.relpath(uri.removeprefix("file:"), lock.parent)
