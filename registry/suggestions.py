"""The end of an error about an unknown name: the name that was probably meant, or the names that exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST_LISTED = 20


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return what to append to "no such NAME": ``: did you mean `X`?``, or the known names; empty for a long list."""
    names = list(known)
    folded = {known_name.casefold(): known_name for known_name in reversed(names)}
    near = difflib.get_close_matches(name.casefold(), list(reversed(folded)), n=1)
    if near:
        return f": did you mean `{folded[near[0]]}`?"
    if not names:
        return ": there are none yet"
    return f": there are {', '.join(f'`{known_name}`' for known_name in names)}" if len(names) <= _MOST_LISTED else ""
