"""Packed weights of 4 and 8 bits on CPUs: unpacked once, when they are loaded, and multiplied in float32."""

from __future__ import annotations

import os

import torch
from vllm import _custom_ops  # noqa: F401 - loads the build of vLLM's kernels that fits the CPU
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig, register_linear_kernel
from vllm.model_executor.layers.quantization import auto_gptq
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

from slipway_kernels import float32

# vLLM's kernel for packed weights takes them on any CPU, and calls an operator that vLLM's AVX2 build lacks.
_VLLM = "CPUWNA16LinearKernel"
_VLLM_OPERATOR = "cpu_gemm_wna16"
_WORD = 32
# AWQ's values are unsigned, with zero points of their own; GPTQ's have one in the middle of their range.
_WITH_ZEROS = (scalar_types.uint4, scalar_types.uint8)
_SYMMETRIC = (scalar_types.uint4b8, scalar_types.uint8b128)


class Float32PackedLinearKernel(MPLinearKernel):  # type: ignore[misc]
    """Takes AWQ (asymmetric) and GPTQ (symmetric), 4 and 8 bits, in groups of any size or one group a channel."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Return that any device will do: what it is registered for is a CPU."""
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Say whether it takes a layer, and why not."""
        known = _WITH_ZEROS if c.zero_points else _SYMMETRIC
        if c.weight_type not in known:
            return False, f"weights of {c.weight_type} are not among {', '.join(map(str, known))}"
        inputs = c.partition_weight_shape[0]
        if c.group_size > 0 and inputs % c.group_size:
            return False, f"groups of {c.group_size} do not divide {inputs} inputs"
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the layer's packed weight, scales and zero points by a float32 weight."""
        packed, scales, zeros = self._get_weight_params(layer)
        bits = self.config.weight_type.size_bits
        values = unpacked(_inputs_first(packed), bits, axis=0)
        scale = _inputs_first(scales)
        if self.config.zero_points:
            zero = unpacked(_inputs_first(zeros), bits, axis=1)
        else:
            zero = torch.tensor(self.config.weight_type.bias, dtype=torch.int32)
        self.linear = float32.linear(dequantized(values, scale, zero).t())
        # vLLM's layers for LoRA adapters ask the packed weight for its device: it stays, without its values.
        for name in filter(None, (self.w_q_name, self.w_s_name, self.w_zp_name)):
            setattr(layer, name, torch.nn.Parameter(packed.new_empty(0), requires_grad=False))

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002 - vLLM's interface
        """Multiply, in the type of ``x``."""
        return self.linear(x, bias)


def install() -> None:
    """Offer the kernel to vLLM, after all of its own: it gets the layers that no other takes."""
    if not hasattr(torch.ops._C, _VLLM_OPERATOR):  # noqa: SLF001 - where vLLM's operators are
        disabled = filter(None, os.environ.get("VLLM_DISABLED_KERNELS", "").split(","))
        os.environ["VLLM_DISABLED_KERNELS"] = ",".join(sorted({*disabled, _VLLM}))
    register_linear_kernel(Float32PackedLinearKernel, PlatformEnum.CPU)
    # vLLM holds GPTQ to what a GPU's kernel takes, less its 8 bits; each kernel is asked next what it takes itself.
    auto_gptq.verify_marlin_supported = lambda **_: None


def unpacked(words: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """Return the unsigned values that lie in 32-bit words, the lowest bits first, along an axis of a matrix."""
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
    along = shifts.reshape(-1, 1) if axis == 0 else shifts
    return ((words.unsqueeze(axis + 1) >> along) & (2**bits - 1)).flatten(axis, axis + 1)


def dequantized(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Return ``(values - zeros) * scales`` in float32, as (in, out).

    ``values`` is (in, out); ``scales`` and ``zeros`` (groups, out), or ``zeros`` one number for all. A group is as many
    inputs as make the groups equal.
    """
    groups, outputs = scales.shape
    grouped = values.reshape(groups, -1, outputs)
    centered = grouped - (zeros.unsqueeze(1) if zeros.ndim else zeros)
    return (centered.to(torch.float32) * scales.to(torch.float32).unsqueeze(1)).reshape(-1, outputs)


def _inputs_first(parameter: torch.Tensor) -> torch.Tensor:
    """Return a parameter with its outputs last, which those of compressed-tensors and AWQ's zero points have first."""
    return parameter.data.t() if parameter.output_dim == 0 else parameter.data
