"""Data sets of a hub, ``hf://datasets/ORG/NAME``: files of JSON lines or Parquet, pinned and locked like weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from pathlib import Path

from pipeline.errors import SourceError
from pipeline.sources.contents import Contents, listed
from registry.progress import Progress

# Larger data is no calibration: a few hundred rows are used.
MOST_BYTES = 4 << 30
# Up to eight folders, none of them hidden, and no name that is too long for file systems.
_NAME = r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,200}"
_SAFE = re.compile(rf"({_NAME}/){{0,8}}{_NAME}")
_FORMS = (".jsonl", ".parquet")


def lock_of(model_lock: Path, number: int) -> Path:
    """The lock of a model's calibration source. No model's name has an underscore, so no other model has this lock."""
    return model_lock.with_name(model_lock.name.replace(".lock.json", f".calibration_{number}.lock.json"))


def dataset(pattern: str) -> Contents:
    """The files of a data set whose paths match ``pattern``, as ``data/train-*.parquet``."""

    def is_taken(name: str, _weights: Collection[str]) -> bool:
        return name.endswith(_FORMS) and _SAFE.fullmatch(name) is not None and fnmatchcase(name, pattern)

    def files(uri: str, names: list[str], _index: Callable[[], bytes]) -> list[str]:
        found = [name for name in names if is_taken(name, ())]
        if not found:
            data = [name for name in names if name.endswith(_FORMS)]
            there = f"it has {listed(data)}" if data else "it has none at all"
            raise SourceError(f"{uri} has no file of .jsonl or .parquet like `{pattern}`: {there}")
        return found

    return Contents(files, is_taken, _accept_names, _accept_files)


def _accept_names(_uri: str, _taken: list[str]) -> None:
    """Every name that is taken will do."""


def _accept_files(_folder: Path, _progress: Progress) -> None:
    """Rows are checked where they are read."""
