"""16-bit linear layers on CPUs that have no arithmetic of that type: float32 behind the same interface."""

from __future__ import annotations

import torch
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from slipway_kernels import float32

# What multiplies a layer, by the function that vLLM's own choice calls (`dispatch_cpu_unquantized_gemm`).
_CALLED = {"onednn_mm": "onednn", "weight_packed_linear_cpu": "amx", "linear": "torch"}
OURS = "float32"


def install() -> None:
    """Choose for each 16-bit linear layer, where vLLM chooses on CPUs."""
    choose = utils.dispatch_cpu_unquantized_gemm

    def dispatch(layer: torch.nn.Module, remove_weight: bool) -> None:
        weight = layer.weight
        if weight.is_meta or weight.ndim != 2 or has_arithmetic(weight.dtype):
            choose(layer, remove_weight)
        else:
            _replace(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = dispatch


def instruction_set() -> str:
    """Name the best that kernels may use on this CPU; vLLM asks torch for the same."""
    able = torch.cpu.get_capabilities()
    features = {"amx": "amx_tile", "avx512_bf16": "avx512_bf16", "avx512": "avx512_f"}
    return next((name for name, feature in features.items() if able.get(feature)), "avx2")


def has_arithmetic(kind: torch.dtype) -> bool:
    """Say whether this CPU multiplies numbers of a type itself, so that oneDNN has a fast kernel for it."""
    able = torch.cpu.get_capabilities()
    if kind == torch.bfloat16:
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    if kind == torch.float16:
        return bool(able.get("avx512_fp16") or able.get("amx_fp16"))
    return True


def used_by(layer: torch.nn.Module) -> str | None:
    """Name what multiplies a layer that is not quantized; None where it is no such layer, or only looks words up."""
    chosen = getattr(layer, "cpu_linear", None)
    if chosen is None or _only_embeds(layer):
        return None
    if chosen is torch.nn.functional.linear:
        return "torch"
    if hasattr(chosen, OURS):
        return OURS
    names = set(chosen.__code__.co_names)
    return next((name for called, name in _CALLED.items() if called in names), "unknown")


def _only_embeds(layer: torch.nn.Module) -> bool:
    """Whether a layer looks words up; some models multiply with it too, which vLLM tells of none."""
    return isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)


def _replace(layer: torch.nn.Module, remove_weight: bool) -> None:
    """Set ``layer.cpu_linear``, and leave no 16-bit weight behind that nobody reads."""
    made = None if _only_embeds(layer) else float32.linear(layer.weight)

    def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        nonlocal made
        if made is None:
            made = float32.linear(weight)
        return made(x, bias)

    setattr(multiply, OURS, True)
    layer.cpu_linear = multiply
    if remove_weight:
        empty = torch.empty(0, dtype=layer.weight.dtype)
        layer.weight = torch.nn.Parameter(empty, requires_grad=False)
