"""Prepares torch as it is imported; a ``.pth`` file loads this into every Python of an image or a worker's environment.

Its vector functions are exact from the first call on. oneMKL 2024.2, which is in torch's wheels, looks for the kernel
of a vector function when that is first called. Threads that call it first together may get one that is less exact, that
once: 1e-4 off in half of a rotary embedding's cosines, which then serve for good (issue 188792 of PyTorch). So one
thread calls each of them when torch has been imported.

``SLIPWAY_CPU_ISA=avx2`` has a CPU behave as one without AVX-512 and AMX, so that one machine can test both kinds: torch
reports neither, from which vLLM chooses its kernels, and ATen, oneDNN (torch's and vLLM's) and MKL use neither. Child
processes inherit it.
"""
# ruff: noqa: INP001 - a module that is copied into images and environments

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import MappingProxyType, ModuleType

# What ATen hands to oneMKL: aten/src/ATen/cpu/vml.h.
_FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp"),
    *("log", "log10", "sin", "sqrt", "tan", "tanh", "trunc"),
)
_LIMIT = "SLIPWAY_CPU_ISA"
# Read by each library when it is loaded.
_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
_BEYOND_AVX2 = ("avx512", "avx10", "amx")


class Torch:
    """Finds torch where Python finds it, and prepares it once it is loaded."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return torch's specification, and of every other module none."""
        found = PathFinder.find_spec(name, path, target) if name == "torch" else None
        if found is None or found.loader is None:
            return None
        load = found.loader.exec_module

        def load_and_prepare(module: ModuleType) -> None:
            load(module)
            if os.environ.get(_LIMIT):
                _mask(module)
            for kind in (module.float32, module.float64):
                for function in _FUNCTIONS:
                    getattr(module, function)(module.zeros(1, dtype=kind))

        found.loader.exec_module = load_and_prepare  # type: ignore[method-assign]
        return found


def _mask(torch: ModuleType) -> None:
    """Have torch report a CPU without what is beyond AVX2: ``torch.cpu`` answers every such question from this."""
    found = torch.cpu.get_capabilities()
    masked = {name: value and not name.startswith(_BEYOND_AVX2) for name, value in found.items()}
    torch.cpu.get_capabilities = lambda: MappingProxyType({**found, **masked})


def _limit() -> None:
    """Set the libraries' own variables; a value that is not known ends this Python, which would disregard it."""
    wanted = os.environ.get(_LIMIT)
    if not wanted:
        return
    if wanted != "avx2":
        sys.exit(f"`{_LIMIT}` is {wanted!r}: expected `avx2`, or nothing for what the CPU has")
    os.environ.update(_AVX2)


_limit()
sys.meta_path.insert(0, Torch)
