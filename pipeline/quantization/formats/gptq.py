"""GPTQ's layout, as AutoGPTQ defined it (``auto_gptq/nn_modules/qlinear``) and GPTQModel and vLLM read it.

For a source weight of [out, in], b bits and g = in / group_size groups, packed along the inputs, the lowest bits
first::

    qweight I32 [in·b/32, out]    qzeros I32 [g, out·b/32]    scales F16 [g, out]    g_idx I32 [in]

A weight is (q - zero) * scale of the group that ``g_idx`` names; ``qzeros`` holds zeros less one (``checkpoint_format``
``gptq``; GPTQModel's ``gptq_v2`` is not written).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.compatibility.safetensors_headers import Tensor
from pipeline.quantization.formats.checkpoint_format import (
    PackedLayer,
    Stored,
    groups_of,
    scale_problems,
    stated_otherwise,
    unpack,
)

if TYPE_CHECKING:
    from pipeline.compatibility.scheme import Scheme

REST_DTYPE: str | None = "F16"
AXIS = 1
MARK = "qweight"


def layout(weight: Tensor, scheme: Scheme) -> dict[str, Stored]:
    """See `CheckpointFormat`."""
    out, inputs = weight.shape
    groups = groups_of(inputs, scheme.group_size)
    return {
        "qweight": Stored("I32", (math.ceil(inputs * scheme.bits / 32), out)),
        "qzeros": Stored("I32", (groups, math.ceil(out * scheme.bits / 32))),
        "scales": Stored("F16", (groups, out)),
        "g_idx": Stored("I32", (inputs,)),
    }


def weight_shape(stored: Tensor, scheme: Scheme) -> tuple[int, ...]:
    """See `LayerFormat`."""
    packed, out = stored.shape
    return (out, packed * 32 // scheme.bits)


def config_problems(stated: Mapping[str, Any], scheme: Scheme) -> Iterator[str]:
    """See `CheckpointFormat`."""
    expected = {"quant_method": "gptq", "bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}
    yield from stated_otherwise(stated, {**expected, "desc_act": scheme.desc_act, "checkpoint_format": "gptq"})


def layer_problems(layer: PackedLayer, scheme: Scheme) -> Iterator[str]:
    """See `CheckpointFormat`."""
    yield from scale_problems(f"{layer.name}.scales", layer.read("scales"))
    # Input i belongs to group i // group_size; with `desc_act` in another order, but as many to each.
    index = layer.read("g_idx")
    size = len(index) if scheme.group_size == -1 else scheme.group_size
    found = np.sort(index) if scheme.desc_act else index
    if not np.array_equal(found, np.arange(len(index)) // size):
        in_order = "" if scheme.desc_act else ", in their order"
        yield f"{layer.name}.g_idx does not put {size} inputs into each group{in_order}"


def decode(layer: PackedLayer, span: slice, scheme: Scheme) -> NDArray[np.float32]:
    """See `CheckpointFormat`."""
    words = slice(span.start * scheme.bits // 32, math.ceil(span.stop * scheme.bits / 32))
    group = layer.read("g_idx", span)
    zeros = (unpack(layer.read("qzeros").T, scheme.bits).T + 1) % 2**scheme.bits
    values = unpack(layer.read("qweight", words), scheme.bits) - zeros[group]
    return np.ascontiguousarray((values * layer.read("scales")[group]).T, np.float32)


def rescales(scheme: Scheme) -> bool:  # noqa: ARG001 - the Protocol's
    """See `CheckpointFormat`."""
    return False
