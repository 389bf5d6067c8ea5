"""How long each audit trail was when it was seen last, and its digest: kept in a cache, by registry and line.

What was cut off the end of a trail, with the aliases set back, looks like an earlier day; who remembers is not fooled.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from registry import journal
from registry.backend import Line
from registry.errors import DiskError, PullError
from registry.policy import Policy
from registry.tracking import shown


def remember(cache: Path, tracking_uri: str, line: Line, policy: Policy) -> None:
    """Refuse an audit trail that is shorter than the one seen last, or another one; write down how long it is.

    Where moves must be signed, it is as long as its signed entries are: who has no key can't make it longer.

    Raises:
        PullError: The registry was set back.
        DiskError: The cache can't be written.
    """
    trail = journal.records(line)
    counted = [record for record in trail if not policy.signed_moves or record.signed_by(policy.keys) is not None]
    longest = counted[-1].entry.number if counted else 0
    place = _place(cache, tracking_uri, line.name)
    seen, digest = _seen(place)
    back = f"the registry was set back; where that is right, remove `{place}`"
    if longest < seen:
        raise PullError(f"the audit trail of `{line.name}` ends at entry {longest}, and was at {seen} before: {back}")
    if digest and _entry_digest(trail, seen) != digest:
        raise PullError(
            f"entry {seen} of the audit trail of `{line.name}` is another one than was there before: {back}"
        )
    if longest > seen:
        new = place.with_name(f".{line.name}.{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(f"{longest} {_entry_digest(trail, longest)}")
            new.replace(place)
        except OSError as error:
            raise DiskError(f"can't write to the cache `{cache}`: {error.strerror}") from error


def _place(cache: Path, tracking_uri: str, name: str) -> Path:
    registry = hashlib.sha256(shown(tracking_uri).rstrip("/").encode()).hexdigest()[:16]
    return cache / "trails" / registry / name


def _seen(place: Path) -> tuple[int, str]:
    try:
        number, _, digest = place.read_text().partition(" ")
        return int(number), digest
    except (OSError, ValueError):
        return 0, ""


def _entry_digest(trail: list[journal.Record], number: int) -> str:
    payload = next((record.entry.payload() for record in trail if record.entry.number == number), b"")
    return hashlib.sha256(payload).hexdigest()
