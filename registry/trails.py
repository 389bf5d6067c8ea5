"""How long each audit trail was when it was seen last, and its digest: kept in a cache, by registry and line.

What was cut off the end of a trail, with the aliases set back, looks like an earlier day; who remembers is not fooled.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from registry import journal, untrusted
from registry.atomic_write import write_atomically
from registry.backend import Line
from registry.errors import DiskError, PullError, UntrustedFileError
from registry.policy import Policy
from registry.tracking import shown

_NOTE = re.compile(rb"([0-9]{1,18}) ([0-9a-f]{64})")
_LONGEST_NOTE = 100


def remember(cache: Path, tracking_uri: str, line: Line, policy: Policy) -> None:
    """Refuse an audit trail that is shorter than the one seen last, or another one; write down how long it is.

    Where moves must be signed, it is as long as its signed entries are: who has no key can't make it longer.

    Raises:
        PullError: The registry was set back, or what was seen of it can't be read.
        DiskError: The cache can't be written.
    """
    trail = journal.records(line)
    counted = [record for record in trail if not policy.signed_moves or record.signed_by(policy.keys) is not None]
    longest = counted[-1].entry.number if counted else 0
    place = _place(cache, tracking_uri, line.name)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"can't write to the cache `{cache}`: {error.strerror}") from error
    seen, digest = _seen(place)
    back = f"the registry was set back; where that is right, remove `{place}`"
    if longest < seen:
        raise PullError(f"the audit trail of `{line.name}` ends at entry {longest}, and was at {seen} before: {back}")
    if digest and _entry_digest(trail, seen) != digest:
        raise PullError(
            f"entry {seen} of the audit trail of `{line.name}` is another one than was there before: {back}"
        )
    if longest > seen:
        try:
            write_atomically(place, f"{longest} {_entry_digest(trail, longest)}")
        except OSError as error:
            raise DiskError(f"can't write to the cache `{cache}`: {error.strerror}") from error


def _place(cache: Path, tracking_uri: str, name: str) -> Path:
    registry = hashlib.sha256(shown(tracking_uri).rstrip("/").encode()).hexdigest()[:16]
    return cache / "trails" / registry / name


def _seen(place: Path) -> tuple[int, str]:
    try:
        found = _NOTE.fullmatch(untrusted.read(place.parent, place.name, _LONGEST_NOTE))
    except FileNotFoundError:
        return 0, ""
    except (OSError, UntrustedFileError) as error:
        raise PullError(f"what was seen of an audit trail can't be read in `{place}`: {error}") from error
    if found is None:
        raise PullError(f"`{place}` does not say what was seen of an audit trail: it is damaged; remove it")
    return int(found[1]), found[2].decode()


def _entry_digest(trail: list[journal.JournalRecord], number: int) -> str:
    payload = next((record.entry.payload() for record in trail if record.entry.number == number), b"")
    return hashlib.sha256(payload).hexdigest()
