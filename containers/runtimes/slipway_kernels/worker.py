"""The engine's worker: vLLM's own for CPUs, which says what it runs, and does not run without our kernels."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TypedDict

import torch
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.v1.worker.cpu_worker import CPUWorker

import slipway_kernels
from slipway_kernels import unquantized

_MARK = "slipway kernels: "


class Kernels(TypedDict):
    """What multiplies the model: ``containers/sandbox/kernels.py`` reads it from the log."""

    attention: str
    compute_dtype: str
    cpu_model: str
    instruction_set: str
    kv_cache_dtype: str
    linear_16bit: str
    linear_quantized: dict[str, int]
    threads: int


class Worker(CPUWorker):  # type: ignore[misc]
    """A worker of vLLM on a CPU."""

    def __init__(self, *args: object, **keywords: object) -> None:
        """Take what vLLM's takes.

        Raises:
            RuntimeError: vLLM has not loaded the plugin of this package.
        """
        if not slipway_kernels.registered:
            raise RuntimeError(
                "vLLM has not loaded the plugin `slipway_kernels`: its log says why (`Failed to load plugin`), or "
                "VLLM_PLUGINS leaves it out; build the runtime again"
            )
        super().__init__(*args, **keywords)

    def load_model(self, **keywords: object) -> None:
        """Load the model and say what multiplies it, once for all workers of an engine."""
        super().load_model(**keywords)
        if self.rank == 0:
            line = json.dumps(self._kernels(), sort_keys=True)
            sys.stderr.write(f"{_MARK}{line}\n")
            sys.stderr.flush()

    def _kernels(self) -> Kernels:
        config = self.vllm_config
        model = self.model_runner.get_model()
        compute = _name(config.model_config.dtype)
        cache = config.cache_config.cache_dtype
        layers = config.compilation_config.static_forward_context.values()
        backends = {layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")}
        # vLLM's layers for LoRA adapters answer for the layer that they wrap, which is a module of its own.
        modules = [module for module in model.modules() if not isinstance(module, BaseLayerWithLoRA)]
        plain = {unquantized.used_by(module) for module in modules} - {None}
        named = sorted(f"{each}" if each == unquantized.OURS else f"{each}-{compute}" for each in plain)
        return {
            "attention": "+".join(sorted(backends)) or "none",
            "compute_dtype": compute,
            "cpu_model": _cpu_model(),
            "instruction_set": unquantized.instruction_set(),
            "kv_cache_dtype": compute if cache == "auto" else str(cache),
            "linear_16bit": "+".join(named) or "none",
            "linear_quantized": dict(Counter(filter(None, map(_quantized_by, modules)))),
            "threads": torch.get_num_threads(),
        }


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return "unknown"


def _quantized_by(module: torch.nn.Module) -> str | None:
    """Name the kernel of a quantized linear layer: vLLM's methods and schemes keep it in an attribute."""
    holders = (getattr(module, "quant_method", None), getattr(module, "scheme", None))
    kept = [value for holder in holders if holder is not None for value in vars(holder).values()]
    return next((type(value).__name__ for value in kept if type(value).__name__.endswith("Kernel")), None)
