"""AWQ's layout for GEMM kernels, as AutoAWQ defined it (``awq/modules/linear/gemm.py``) and vLLM reads it.

For a source weight of [out, in], 4 bits and g = in / group_size groups, eight outputs in each int32, in the order
0 2 4 6 1 3 5 7 from the lowest bits::

    qweight I32 [in, out/8]    qzeros I32 [g, out/8]    scales F16 [g, out]

A weight is (q - zero) * scale. AWQ multiplies the inputs that matter and divides what produces them: a norm, or the
rows of another linear layer (arXiv:2306.00978, 3.2). So weights and norms differ from the source's by factors.
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
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where each of eight outputs lies


def layout(weight: Tensor, scheme: Scheme) -> dict[str, Stored]:
    """See `CheckpointFormat`."""
    out, inputs = weight.shape
    groups, packed = groups_of(inputs, scheme.group_size), math.ceil(out * scheme.bits / 32)
    return {
        "qweight": Stored("I32", (inputs, packed)),
        "qzeros": Stored("I32", (groups, packed)),
        "scales": Stored("F16", (groups, out)),
    }


def weight_shape(stored: Tensor, scheme: Scheme) -> tuple[int, ...]:
    """See `LayerFormat`."""
    inputs, packed = stored.shape
    return (packed * 32 // scheme.bits, inputs)


def config_problems(stated: Mapping[str, Any], scheme: Scheme) -> Iterator[str]:
    """See `CheckpointFormat`."""
    expected = {"quant_method": "awq", "bits": scheme.bits, "group_size": scheme.group_size}
    yield from stated_otherwise(stated, {**expected, "zero_point": True, "version": "gemm"})


def layer_problems(layer: PackedLayer, scheme: Scheme) -> Iterator[str]:  # noqa: ARG001 - the Protocol's
    """See `CheckpointFormat`."""
    yield from scale_problems(f"{layer.name}.scales", layer.read("scales"))


def decode(layer: PackedLayer, span: slice, scheme: Scheme) -> NDArray[np.float32]:
    """See `CheckpointFormat`."""
    groups = slice(span.start // scheme.group_size, groups_of(span.stop, scheme.group_size))
    group = np.arange(span.start, span.stop) // scheme.group_size - groups.start
    zeros, scales = _outputs(layer.read("qzeros", groups)), layer.read("scales", groups)
    values = (_outputs(layer.read("qweight", span)) - zeros[group]) * scales[group]
    return np.ascontiguousarray(values.T, np.float32)


def rescales(scheme: Scheme) -> bool:  # noqa: ARG001 - the Protocol's
    """See `CheckpointFormat`."""
    return True


def _outputs(words: NDArray[Any]) -> NDArray[np.int32]:
    """[rows, out/8] words as [rows, out] numbers."""
    apart = unpack(words.T, 4).reshape(words.shape[1], 8, words.shape[0])
    return apart[:, _ORDER].reshape(-1, words.shape[0]).T
