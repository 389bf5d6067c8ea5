"""Has torch's vector functions exact from the first call on; a ``.pth`` file loads it into every Python.

oneMKL 2024.2, which is in torch's wheels, looks for the kernel of a vector function when that is first called. Threads
that call it first together may get one that is less exact, that once: 1e-4 off in half of a rotary embedding's cosines,
which then serve for good (issue 188792 of PyTorch). So one thread calls each of them when torch has been imported.
"""
# ruff: noqa: INP001 - a module that is copied into images and environments

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# What ATen hands to oneMKL: aten/src/ATen/cpu/vml.h.
_FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp"),
    *("log", "log10", "sin", "sqrt", "tan", "tanh", "trunc"),
)


class Torch:
    """Finds torch where Python finds it, and calls its functions once it is loaded."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return torch's specification, and of every other module none."""
        found = PathFinder.find_spec(name, path, target) if name == "torch" else None
        if found is None or found.loader is None:
            return None
        load = found.loader.exec_module

        def load_and_call(module: ModuleType) -> None:
            load(module)
            for kind in (module.float32, module.float64):
                for function in _FUNCTIONS:
                    getattr(module, function)(module.zeros(1, dtype=kind))

        found.loader.exec_module = load_and_call  # type: ignore[method-assign]
        return found


sys.meta_path.insert(0, Torch)
