"""Digests, and the canonical JSON that they are computed from.

Canonical JSON is UTF-8 with keys sorted by Unicode code point, no white space, no NaN or infinity, and non-ASCII
characters as themselves. One document therefore has one digest.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

_CHUNK = 4 * 1024 * 1024


def canonical_json(document: object) -> bytes:
    """Return a JSON value in canonical form.

    Raises:
        ValueError: It contains NaN or infinity.
    """
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(data: bytes) -> str:
    """Return ``sha256:`` and the SHA-256 of ``data``."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def digest_json(document: object) -> str:
    """Return ``sha256:`` and the SHA-256 of a document's canonical JSON."""
    return digest_of(canonical_json(document))


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hex digits, without the prefix."""
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            total.update(chunk)
    return total.hexdigest()
