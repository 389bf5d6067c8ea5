"""MXFP4 as compressed-tensors stores it (``mxfp4-pack-quantized``).

The Open Compute Project's microscaling format (OCP MX 1.0): E2M1 numbers in groups of 32, each group with a power of
two. For a source weight of [out, in], two inputs in a byte, the first in the lower bits::

    weight_packed U8 [out, in/2]    weight_scale U8 [out, in/32]

A weight is q * 2**(weight_scale - 127); 255 is no number. Inputs are quantized alike when the model runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.compatibility.safetensors_headers import Tensor
from pipeline.quantization.formats import compressed_tensors
from pipeline.quantization.formats.checkpoint_format import PackedLayer, Stored

if TYPE_CHECKING:
    from pipeline.compatibility.scheme import Scheme

REST_DTYPE: str | None = None
AXIS = 0
MARK = "weight_packed"
_BIAS, _NOT_A_NUMBER = 127, 255


def layout(weight: Tensor, scheme: Scheme) -> dict[str, Stored]:
    """See `CheckpointFormat`."""
    out, inputs = weight.shape
    return {
        "weight_packed": Stored("U8", (out, inputs // 2)),
        "weight_scale": Stored("U8", (out, inputs // scheme.group_size)),
    }


def weight_shape(stored: Tensor, scheme: Scheme) -> tuple[int, ...]:  # noqa: ARG001 - the Protocol's
    """See `LayerFormat`."""
    out, packed = stored.shape
    return (out, 2 * packed)


def config_problems(stated: Mapping[str, Any], scheme: Scheme) -> Iterator[str]:
    """See `CheckpointFormat`."""
    number = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": scheme.group_size}
    yield from compressed_tensors.config_problems(
        stated, "mxfp4-pack-quantized", {**number, "dynamic": False}, {**number, "dynamic": True}
    )


def layer_problems(layer: PackedLayer, scheme: Scheme) -> Iterator[str]:  # noqa: ARG001 - the Protocol's
    """See `CheckpointFormat`."""
    if (layer.read("weight_scale") == _NOT_A_NUMBER).any():
        yield f"{layer.name}.weight_scale holds a value that is not a number"


def decode(layer: PackedLayer, span: slice, scheme: Scheme) -> NDArray[np.float32]:
    """See `CheckpointFormat`."""
    scales = np.ldexp(np.float32(1), layer.read("weight_scale", span).astype(np.int32) - _BIAS)
    values = compressed_tensors.fp4(layer.read("weight_packed", span))
    decoded: NDArray[np.float32] = values * np.repeat(scales, scheme.group_size, axis=1)
    return decoded


def rescales(scheme: Scheme) -> bool:  # noqa: ARG001 - the Protocol's
    """See `CheckpointFormat`."""
    return False
