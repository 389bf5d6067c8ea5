"""INT8 with a scale for each output, as compressed-tensors stores it (``int-quantized``, strategy ``channel``).

For a source weight of [out, in]::

    weight I8 [out, in]    weight_scale [out, 1], of the source's dtype

A weight is the stored number times its row's scale. Inputs are quantized when the model runs, a scale for each token;
SmoothQuant (arXiv:2211.10438) moves factors from them into the weights, and out of the norm in front.
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
MARK = "weight"


def layout(weight: Tensor, scheme: Scheme) -> dict[str, Stored]:  # noqa: ARG001 - the Protocol's
    """See `CheckpointFormat`."""
    return {"weight": Stored("I8", weight.shape), "weight_scale": Stored(weight.dtype, (weight.shape[0], 1))}


def weight_shape(stored: Tensor, scheme: Scheme) -> tuple[int, ...]:  # noqa: ARG001 - the Protocol's
    """See `LayerFormat`."""
    return stored.shape


def config_problems(stated: Mapping[str, Any], scheme: Scheme) -> Iterator[str]:  # noqa: ARG001 - the Protocol's
    """See `CheckpointFormat`."""
    yield from compressed_tensors.rows_config_problems(stated, "int-quantized", "int")


def layer_problems(layer: PackedLayer, scheme: Scheme) -> Iterator[str]:  # noqa: ARG001 - the Protocol's
    """See `CheckpointFormat`."""
    yield from scale_problems(f"{layer.name}.weight_scale", layer.read("weight_scale"))


def decode(layer: PackedLayer, span: slice, scheme: Scheme) -> NDArray[np.float32]:  # noqa: ARG001 - the Protocol's
    """See `CheckpointFormat`."""
    return compressed_tensors.decode_rows(layer, span)


def rescales(scheme: Scheme) -> bool:  # noqa: ARG001 - the Protocol's
    """See `CheckpointFormat`."""
    return True
