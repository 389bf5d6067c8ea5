"""MXFP4 of fused experts, as GPT-OSS is published (``quant_method`` ``mxfp4``); all other layers have 16 bits.

The layout is what transformers reads (``integrations/mxfp4.py: convert_moe_packed_tensors``). For the weights of E
experts, which transformers keeps at 16 bits as one tensor ``NAME`` of [E, in, out]::

    NAME_blocks U8 [E, out, in/32, 16]    NAME_scales U8 [E, out, in/32]

An expert's share of both is a matrix [out, in] in the layout of `mxfp4`, the first of two inputs in the lower bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.compatibility.safetensors_headers import Tensor
from pipeline.quantization.formats import mxfp4
from pipeline.quantization.formats.checkpoint_format import PackedLayer, stated_otherwise

if TYPE_CHECKING:
    from pipeline.compatibility.scheme import Scheme

REST_DTYPE: str | None = None
AXIS = mxfp4.AXIS
MARK = mxfp4.MARK
BLOCKS, SCALES = "_blocks", "_scales"
layout, weight_shape, layer_problems, decode = mxfp4.layout, mxfp4.weight_shape, mxfp4.layer_problems, mxfp4.decode
rescales = mxfp4.rescales
_BLOCK_BYTES = 16
_DIMENSIONS = 4


def config_problems(stated: Mapping[str, Any], scheme: Scheme) -> Iterator[str]:  # noqa: ARG001 - the Protocol's
    """See `CheckpointFormat`."""
    yield from stated_otherwise(stated, {"quant_method": "mxfp4"})


def fused_shape(blocks: Tensor) -> tuple[int, ...] | None:
    """The shape at 16 bits, [E, in, out], of experts with such ``blocks``; None if these are no blocks."""
    if len(blocks.shape) != _DIMENSIONS or blocks.shape[3] != _BLOCK_BYTES or not all(blocks.shape):
        return None
    experts, out, groups, _ = blocks.shape
    return (experts, 2 * groups * _BLOCK_BYTES, out)


def expert_layers(name: str, tensors: Mapping[str, Tensor], fused: Tensor) -> Iterator[PackedLayer]:
    """Each expert of the fused tensor ``name`` as a layer of its own; ``fused`` is its 16-bit tensor [E, in, out]."""
    experts, inputs, out = fused.shape
    blocks, scales = tensors[f"{name}{BLOCKS}"], tensors.get(f"{name}{SCALES}")
    shares = {"weight_packed": _shares(blocks, experts, (out, inputs // 2))}
    if scales is not None and scales.shape == blocks.shape[:-1]:
        shares["weight_scale"] = _shares(scales, experts, (out, blocks.shape[2]))
    weights = _shares(fused, experts, (inputs, out))
    for number in range(experts):
        yield PackedLayer(
            f"{name}[{number}]",
            replace(weights[number], shape=(out, inputs)),
            {part: of_each[number] for part, of_each in shares.items()},
            transposed=True,
        )


def _shares(tensor: Tensor, experts: int, shape: tuple[int, int]) -> list[Tensor]:
    """The part of a tensor's bytes that belongs to each expert, as a matrix."""
    size = tensor.bytes // experts
    return [
        replace(tensor, shape=shape, start=tensor.start + number * size, end=tensor.start + (number + 1) * size)
        for number in range(experts)
    ]
