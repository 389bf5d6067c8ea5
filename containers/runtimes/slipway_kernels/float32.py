"""A linear layer that computes in float32, whatever its neighbours compute in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from vllm import _custom_ops as ops

Linear = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]

# Shapes of input for which oneDNN keeps its compiled kernel: as many as vLLM lets it keep.
_KEPT_SHAPES = 32


def linear(weight: torch.Tensor) -> Linear:
    """Return ``(x, bias) → x @ weight.T + bias``, in the type of ``x``, computed in float32.

    ``weight`` is (out, in) in any type that converts to float32. What is kept of it is oneDNN's own float32 copy alone,
    4 bytes a weight, laid out for the CPU. One core of an AMD Zen 5 held to AVX2 does 120 GFLOP/s so, 100 with MKL (as
    torch calls it), and 18 to 27 in torch's bfloat16 loops; with AVX-512 but no bfloat16 230, and 80 where oneDNN
    emulates bfloat16 (``benchmarks/cpu_kernels.py``).
    """
    handler = ops.create_onednn_mm(weight.to(torch.float32).t(), _KEPT_SHAPES)

    def apply(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        result = ops.onednn_mm(handler, x.to(torch.float32), None)
        if bias is not None:
            result += bias
        return result.to(x.dtype)

    return apply
