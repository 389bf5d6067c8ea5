"""Files of random bytes, which do not compress, as weights do not."""

from __future__ import annotations

import os
from pathlib import Path

_BLOCK_BYTES = 1 << 20


def write_random(path: Path, size: int) -> Path:
    """Write ``size`` bytes, rounded down to whole MiB, no two blocks alike; return the path."""
    block = os.urandom(_BLOCK_BYTES)
    with path.open("wb") as file:
        for number in range(size // _BLOCK_BYTES):
            file.write(number.to_bytes(8, "big") + block[8:])
    return path
