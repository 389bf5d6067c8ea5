"""Integers of four bits in groups, as compressed-tensors stores them (``pack-quantized``), symmetric.

For a source weight of [out, in] and g = in / group_size groups, eight inputs in each int32, the lowest bits first::

    weight_packed I32 [out, in/8]    weight_scale [out, g], of the source's dtype    weight_shape I64 [2]

A weight is (q - 8) * scale. ``weight_shape`` is [out, in]. Inputs stay at 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.compatibility.safetensors_headers import Tensor
from pipeline.quantization.formats import compressed_tensors
from pipeline.quantization.formats.checkpoint_format import PackedLayer, Stored, groups_of, scale_problems, unpack

if TYPE_CHECKING:
    from pipeline.compatibility.scheme import Scheme

REST_DTYPE: str | None = None
AXIS = 0
MARK = "weight_packed"


def layout(weight: Tensor, scheme: Scheme) -> dict[str, Stored]:
    """See `CheckpointFormat`."""
    out, inputs = weight.shape
    return {
        "weight_packed": Stored("I32", (out, math.ceil(inputs * scheme.bits / 32))),
        "weight_scale": Stored(weight.dtype, (out, groups_of(inputs, scheme.group_size))),
        "weight_shape": Stored("I64", (2,)),
    }


def weight_shape(stored: Tensor, scheme: Scheme) -> tuple[int, ...]:
    """See `LayerFormat`."""
    out, packed = stored.shape
    return (out, packed * 32 // scheme.bits)


def config_problems(stated: Mapping[str, Any], scheme: Scheme) -> Iterator[str]:
    """See `CheckpointFormat`."""
    number = {"num_bits": scheme.bits, "type": "int", "symmetric": True}
    group = {"strategy": "group", "group_size": scheme.group_size, "dynamic": False}
    yield from compressed_tensors.config_problems(stated, "pack-quantized", {**number, **group}, None)


def layer_problems(layer: PackedLayer, scheme: Scheme) -> Iterator[str]:  # noqa: ARG001 - the Protocol's
    """See `CheckpointFormat`."""
    yield from scale_problems(f"{layer.name}.weight_scale", layer.read("weight_scale"))
    if (stated := layer.read("weight_shape").tolist()) != list(layer.weight.shape):
        yield f"{layer.name}.weight_shape is {stated}, and the source's weight is {list(layer.weight.shape)}"


def decode(layer: PackedLayer, span: slice, scheme: Scheme) -> NDArray[np.float32]:
    """See `CheckpointFormat`."""
    values = unpack(layer.read("weight_packed", span).T, scheme.bits).T - 2 ** (scheme.bits - 1)
    scales = np.repeat(layer.read("weight_scale", span), scheme.group_size, axis=1)
    decoded: NDArray[np.float32] = values.astype(np.float32) * scales
    return decoded


def rescales(scheme: Scheme) -> bool:  # noqa: ARG001 - the Protocol's
    """See `CheckpointFormat`."""
    return False
