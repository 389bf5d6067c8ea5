"""FP8 with a scale for each square, as DeepSeek V3 is published (``quant_method`` ``fp8``, ``weight_scale_inv``).

The layout is that of the model's repository (``inference/fp8_cast_bf16.py``) and of transformers'
``FineGrainedFP8Config``; Qwen's FP8 checkpoints follow it too. For a source weight of [out, in] and squares of s::

    weight F8_E4M3 [out, in]    weight_scale_inv F32 (DeepSeek) or BF16 (Qwen) [ceil(out/s), ceil(in/s)]

A weight is the stored number times its square's ``weight_scale_inv``, whatever the name says. Inputs are quantized when
the model runs, a scale for each s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.compatibility.safetensors_headers import Tensor
from pipeline.quantization.formats.checkpoint_format import (
    PackedLayer,
    Stored,
    decode_squares,
    groups_of,
    scale_problems,
    stated_otherwise,
)

if TYPE_CHECKING:
    from pipeline.compatibility.scheme import Scheme

REST_DTYPE: str | None = None
AXIS = 0
MARK = "weight"
_SCALES = "weight_scale_inv"


def layout(weight: Tensor, scheme: Scheme) -> dict[str, Stored]:
    """See `CheckpointFormat`."""
    squares = tuple(groups_of(size, scheme.group_size) for size in weight.shape)
    return {MARK: Stored("F8_E4M3", weight.shape), _SCALES: Stored(weight.dtype, squares)}


def weight_shape(stored: Tensor, scheme: Scheme) -> tuple[int, ...]:  # noqa: ARG001 - the Protocol's
    """See `LayerFormat`."""
    return stored.shape


def config_problems(stated: Mapping[str, Any], scheme: Scheme) -> Iterator[str]:
    """See `CheckpointFormat`."""
    expected = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [scheme.group_size] * 2}
    yield from stated_otherwise({"fmt": "e4m3", **stated}, {**expected, "fmt": "e4m3"})


def layer_problems(layer: PackedLayer, scheme: Scheme) -> Iterator[str]:  # noqa: ARG001 - the Protocol's
    """See `CheckpointFormat`."""
    yield from scale_problems(f"{layer.name}.{_SCALES}", layer.read(_SCALES))


def decode(layer: PackedLayer, span: slice, scheme: Scheme) -> NDArray[np.float32]:
    """See `CheckpointFormat`."""
    return decode_squares(layer, _SCALES, span, scheme.group_size)


def rescales(scheme: Scheme) -> bool:  # noqa: ARG001 - the Protocol's
    """See `CheckpointFormat`."""
    return False
