"""Listing an untrusted folder: without recursion, to a limited depth, and without following links."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

DEEPEST = 100
"""Folders in folders that are looked into; no model and no release has as many as ten."""


def entries(folder: Path, wrong: Callable[[str, str], None]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Give everything in a folder but the folders, each by its path in it, in no order.

    ``wrong`` is told, with its path, of each folder that can't be read, or is too deep, and of each name that is not
    UTF-8, which no manifest can hold; what is below it is left out.
    """
    left = [("", folder, 0)]
    while left:
        prefix, path, depth = left.pop()
        try:
            with os.scandir(path) as found:
                listed = list(found)
        except OSError as error:
            wrong(prefix.rstrip("/") or ".", f"can't be read: {error.strerror}")
            continue
        for entry in listed:
            name = prefix + entry.name
            if not _is_utf8(entry.name):
                wrong(name, "its name is not UTF-8")
            elif not entry.is_dir(follow_symlinks=False):
                yield name, entry
            elif depth >= DEEPEST:
                wrong(name[:80] + "…", f"more than {DEEPEST} folders deep")
            else:
                left.append((f"{name}/", path / entry.name, depth + 1))


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
