"""SHA-256 of files that other programs may change, with a memory, so that unchanged files are not read again.

A digest is remembered with the file's size, times and inode. A file without a remembered digest is read.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from registry.atomic_write import write_atomically
from registry.digests import digest_file

# A file system's clock has a resolution of some milliseconds, so a file that was written just before its digest was
# taken may change again with the same time: its digest is not remembered.
_SETTLED_NS = 1_000_000_000


def digests_of(files: Iterable[Path], memory: Path | None = None) -> dict[Path, str]:
    """Return each file's SHA-256, as 64 hex digits; ``memory`` is the file in which they are remembered."""
    known = _read(memory)
    found, read = {}, {}
    for path in files:
        stat = path.stat()
        seen = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        before = known.get(str(path))
        if before is not None and before[:-1] == seen:
            found[path] = str(before[-1])
            continue
        began = time.time_ns()
        found[path] = digest_file(path)
        if stat.st_mtime_ns < began - _SETTLED_NS:
            read[str(path)] = [*seen, found[path]]
    if memory is not None and read:
        with contextlib.suppress(OSError):  # a full disk, or another thread writes it
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(memory, json.dumps({**known, **read}, indent=1))
    return found


def _read(memory: Path | None) -> Mapping[str, list[int | str]]:
    """The remembered digests; none if the memory is missing or damaged."""
    try:
        found = {} if memory is None else json.loads(memory.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
