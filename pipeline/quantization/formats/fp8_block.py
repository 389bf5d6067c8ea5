"""FP8 with a scale for each square of 128 by 128, as compressed-tensors stores it (``float-quantized``, ``block``).

DeepSeek V3 brought it up (arXiv:2412.19437, 3.3). For a source weight of [out, in], borders filled up with zeros::

    weight F8_E4M3 [out, in]    weight_scale [out/128, in/128], of the source's dtype

A weight is the stored number times its square's scale. Inputs are quantized when the model runs, a scale for each 128.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.compatibility.safetensors_headers import Tensor
from pipeline.quantization.formats import compressed_tensors
from pipeline.quantization.formats.checkpoint_format import (
    PackedLayer,
    Stored,
    decode_squares,
    groups_of,
    scale_problems,
)

if TYPE_CHECKING:
    from pipeline.compatibility.scheme import Scheme

REST_DTYPE: str | None = None
AXIS = 0
MARK = "weight"


def layout(weight: Tensor, scheme: Scheme) -> dict[str, Stored]:
    """See `CheckpointFormat`."""
    out, inputs = weight.shape
    squares = (groups_of(out, scheme.group_size), groups_of(inputs, scheme.group_size))
    return {"weight": Stored("F8_E4M3", weight.shape), "weight_scale": Stored(weight.dtype, squares)}


def weight_shape(stored: Tensor, scheme: Scheme) -> tuple[int, ...]:  # noqa: ARG001 - the Protocol's
    """See `LayerFormat`."""
    return stored.shape


def config_problems(stated: Mapping[str, Any], scheme: Scheme) -> Iterator[str]:
    """See `CheckpointFormat`."""
    number, size = {"num_bits": 8, "type": "float", "symmetric": True}, scheme.group_size
    yield from compressed_tensors.config_problems(
        stated,
        "float-quantized",
        {**number, "strategy": "block", "block_structure": [size, size], "dynamic": False},
        {**number, "strategy": "group", "group_size": size, "dynamic": True},
    )


def layer_problems(layer: PackedLayer, scheme: Scheme) -> Iterator[str]:  # noqa: ARG001 - the Protocol's
    """See `CheckpointFormat`."""
    yield from scale_problems(f"{layer.name}.weight_scale", layer.read("weight_scale"))


def decode(layer: PackedLayer, span: slice, scheme: Scheme) -> NDArray[np.float32]:
    """See `CheckpointFormat`."""
    return decode_squares(layer, "weight_scale", span, scheme.group_size)


def rescales(scheme: Scheme) -> bool:  # noqa: ARG001 - the Protocol's
    """See `CheckpointFormat`."""
    return False
