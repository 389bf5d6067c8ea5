"""Files that were downloaded once, in a folder with a record of their digests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from containers.errors import ImageError
from registry.digests import digest_file


def digests(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Return the sha256 of files in ``folder``, by their paths in it."""
    return {path.relative_to(folder).as_posix(): digest_file(path) for path in sorted(files)}


def write_record(record: Path, found: Mapping[str, str]) -> None:
    """Record what was downloaded."""
    record.write_text(json.dumps(found, indent=1, sort_keys=True))


def differences(record: Path, found: Mapping[str, str]) -> list[str]:
    """Say what changed, is missing or is extra since the record was written.

    Raises:
        ImageError: the record can't be read.
    """
    try:
        recorded: dict[str, str] = json.loads(record.read_text())
    except (OSError, ValueError) as error:
        raise ImageError(f"{record} can't be read: remove {record.parent} to download its files again") from error
    both = found.keys() & recorded.keys()
    return [
        *(f"`{name}` changed since it was downloaded" for name in sorted(both) if found[name] != recorded[name]),
        *(f"`{name}` is missing" for name in sorted(recorded.keys() - both)),
        *(f"`{name}` was not downloaded" for name in sorted(found.keys() - both)),
    ]
