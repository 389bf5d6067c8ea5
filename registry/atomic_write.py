"""Files that other processes see whole or not at all: written beside, synced to disk, then renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def write_atomically(path: Path, data: str | bytes, mode: int = 0o644) -> None:
    """Create or replace a file; the umask applies to ``mode``.

    A link at ``path`` is replaced, not followed. The folder must exist.

    Raises:
        OSError: The file can't be written; what was at ``path`` is unchanged.
    """
    with _complete_file(path, data, mode) as beside:
        beside.replace(path)


def create_atomically(path: Path, data: str | bytes, mode: int) -> None:
    """Create a file of exactly this ``mode``; leave what is at ``path`` already, also where it appears meanwhile.

    Raises:
        OSError: The file can't be written.
    """
    with _complete_file(path, data, mode) as beside:
        beside.chmod(mode)
        try:
            os.link(beside, path)
        except FileExistsError:
            return


@contextmanager
def _complete_file(path: Path, data: str | bytes, mode: int) -> Iterator[Path]:
    """Give a synced file beside ``path`` that holds ``data``; it is removed where it was not renamed."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with os.fdopen(os.open(beside, _NEW, mode), "wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        yield beside
    finally:
        beside.unlink(missing_ok=True)
