"""NVFP4 as compressed-tensors stores it (``nvfp4-pack-quantized``).

NVIDIA's format for Blackwell: E2M1 numbers in groups of 16, each group with a scale in FP8, each layer with a scale in
float32. For a source weight of [out, in], two inputs in a byte, the first in the lower bits::

    weight_packed U8 [out, in/2]    weight_scale F8_E4M3 [out, in/16]
    weight_global_scale F32 [1]     input_global_scale F32 [1]

A weight is q * weight_scale / weight_global_scale. The inputs' own scale is calibrated, and of theirs a scale for each
16 is found when the model runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.compatibility.safetensors_headers import Tensor
from pipeline.quantization.formats import compressed_tensors
from pipeline.quantization.formats.checkpoint_format import PackedLayer, Stored, scale_problems

if TYPE_CHECKING:
    from pipeline.compatibility.scheme import Scheme

REST_DTYPE: str | None = None
AXIS = 0
MARK = "weight_packed"


def layout(weight: Tensor, scheme: Scheme) -> dict[str, Stored]:
    """See `CheckpointFormat`."""
    out, inputs = weight.shape
    return {
        "weight_packed": Stored("U8", (out, inputs // 2)),
        "weight_scale": Stored("F8_E4M3", (out, inputs // scheme.group_size)),
        "weight_global_scale": Stored("F32", (1,)),
        "input_global_scale": Stored("F32", (1,)),
    }


def weight_shape(stored: Tensor, scheme: Scheme) -> tuple[int, ...]:  # noqa: ARG001 - the Protocol's
    """See `LayerFormat`."""
    out, packed = stored.shape
    return (out, 2 * packed)


def config_problems(stated: Mapping[str, Any], scheme: Scheme) -> Iterator[str]:
    """See `CheckpointFormat`."""
    number = {"num_bits": 4, "type": "float", "symmetric": True}
    group = {"strategy": "tensor_group", "group_size": scheme.group_size}
    yield from compressed_tensors.config_problems(
        stated,
        "nvfp4-pack-quantized",
        {**number, **group, "dynamic": False},
        {**number, **group, "dynamic": "local"},
    )


def layer_problems(layer: PackedLayer, scheme: Scheme) -> Iterator[str]:  # noqa: ARG001 - the Protocol's
    """See `CheckpointFormat`."""
    for part in ("weight_scale", "weight_global_scale", "input_global_scale"):
        yield from scale_problems(f"{layer.name}.{part}", layer.read(part))


def decode(layer: PackedLayer, span: slice, scheme: Scheme) -> NDArray[np.float32]:
    """See `CheckpointFormat`."""
    scales = layer.read("weight_scale", span) / layer.read("weight_global_scale")
    values = compressed_tensors.fp4(layer.read("weight_packed", span))
    decoded: NDArray[np.float32] = values * np.repeat(scales, scheme.group_size, axis=1)
    return decoded


def rescales(scheme: Scheme) -> bool:  # noqa: ARG001 - the Protocol's
    """See `CheckpointFormat`."""
    return False
