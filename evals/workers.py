"""How the domain runs a worker: a script in a pinned environment of its own, with JSON in and JSON out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

# Environment, script, request and scratch folder; returns the result, which the caller validates.
RunWorker = Callable[[str, Path, Mapping[str, object], Path], Mapping[str, object]]
