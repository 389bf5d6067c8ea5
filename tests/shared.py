"""What is made once for all workers of a run: the first to want it makes it, under a lock, and the others wait."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from registry.file_locks import locked


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder that ``make`` filled for this run of pytest, in whichever of its workers.

    What a test changes in it, others see: read it, or copy it.
    """
    root = _root(factory)
    folder, made = root / name, root / f"{name}.made"
    with locked(root / f"{name}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a try that failed
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


def _root(factory: pytest.TempPathFactory) -> Path:
    """The run's own temporary folder: a worker's lies in it."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
