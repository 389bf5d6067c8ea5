"""The type of progress callbacks: they get one line of text at a time."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str], None]


def silent(_line: str) -> None:
    """Discard progress: the default where the caller shows none."""
