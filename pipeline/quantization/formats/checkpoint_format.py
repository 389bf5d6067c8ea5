"""What the check of a checkpoint and the planner know of a format: the Protocol that each format's module satisfies.

A format's module describes the layout and its source at its head. It reads stored tensors with numpy alone and imports
no quantizer: what a quantizer wrote is checked without its help.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.compatibility.safetensors_headers import BITS, Tensor
from pipeline.compatibility.safetensors_values import read_columns, read_rows

if TYPE_CHECKING:
    from pipeline.compatibility.scheme import Scheme


@dataclass(frozen=True)
class Stored:
    """How a tensor is stored: a dtype as safetensors names it, and a shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True)
class PackedLayer:
    """One quantized linear layer: the source's ``weight`` [out, in], and the stored tensors by their last name."""

    name: str
    weight: Tensor
    parts: Mapping[str, Tensor]
    transposed: bool = False
    """Whether the source stores the weight as [in, out]."""

    def read(self, part: str, rows: slice = slice(None)) -> NDArray[Any]:
        """Values of one tensor, or only some of its rows; floating-point numbers come as float32."""
        return read_rows(self.parts[part], rows)

    def original(self, span: slice, axis: int) -> NDArray[Any]:
        """The source's weights, some of them along an axis, as [out, in]."""
        if self.transposed:
            flipped = replace(self.weight, shape=self.weight.shape[::-1])
            return np.asarray((read_columns if axis == 0 else read_rows)(flipped, span).T)
        return (read_rows if axis == 0 else read_columns)(self.weight, span)


class CheckpointFormat(Protocol):
    """What a checkpoint follows: one format in all layers, or a mixture. A module with these names satisfies it."""

    __name__: str
    REST_DTYPE: str | None
    """What all floating-point tensors that are not quantized are converted to; None if they stay as they are."""

    def config_problems(self, stated: Mapping[str, Any], scheme: Scheme) -> Iterator[str]:
        """Where ``quantization_config`` of config.json does not say what the scheme says."""
        ...

    def rescales(self, scheme: Scheme) -> bool:
        """Whether scales are moved between layers, so that a layer's weights differ from the source's by factors."""
        ...


class LayerFormat(CheckpointFormat, Protocol):
    """One format of quantized layers."""

    AXIS: int
    """The axis of the weight [out, in] that the stored tensors' rows run along, so that a few rows can be decoded."""
    MARK: str
    """The stored tensor that says how large the weight is."""

    def layout(self, weight: Tensor, scheme: Scheme) -> dict[str, Stored]:
        """The stored tensors of a layer whose source has this ``weight``, by their last name."""
        ...

    def weight_shape(self, stored: Tensor, scheme: Scheme) -> tuple[int, ...]:
        """The shape [out, in] of the weight that is stored under the name `MARK`: the inverse of `layout`."""
        ...

    def layer_problems(self, layer: PackedLayer, scheme: Scheme) -> Iterator[str]:
        """What is wrong with the scales and indices of a layer whose dtypes and shapes are right."""
        ...

    def decode(self, layer: PackedLayer, span: slice, scheme: Scheme) -> NDArray[np.float32]:
        """The weights that a part of the layer stands for, as [out, in]: ``span`` along ``AXIS``, a multiple of 128."""
        ...


def stated_otherwise(stated: Mapping[str, Any], expected: Mapping[str, object]) -> Iterator[str]:
    """Yield the keys of ``quantization_config`` that differ from what is expected."""
    for key, value in expected.items():
        if stated.get(key) != value:
            yield f"config.json: `quantization_config.{key}` is {stated.get(key)!r}, expected {value!r}"


def scale_problems(name: str, scales: NDArray[Any]) -> Iterator[str]:
    """Yield what is wrong with scales: each must be a finite number above zero."""
    if not np.isfinite(scales).all():
        yield f"{name} holds a value that is not finite"
    elif (scales <= 0).any():
        yield f"{name} holds {int((scales <= 0).sum())} values that are not above zero"


def decode_squares(layer: PackedLayer, scales: str, span: slice, size: int) -> NDArray[np.float32]:
    """The weights of numbers that are stored one by one, each times the scale of its square; of some rows."""
    values = layer.read("weight", span)
    squares = layer.read(scales, slice(span.start // size, groups_of(span.stop, size)))
    rows, columns = np.arange(values.shape[0]) // size, np.arange(values.shape[1]) // size
    decoded: NDArray[np.float32] = values * squares[rows][:, columns]
    return decoded


def groups_of(inputs: int, group_size: int) -> int:
    """How many groups ``inputs`` weights make; -1 is one group over all."""
    return 1 if group_size == -1 else math.ceil(inputs / group_size)


def unpack(words: NDArray[Any], bits: int) -> NDArray[np.int32]:
    """Take [n, m] words of 32 bits apart into [n·32/bits, m] numbers, each column one stream of bits, lowest first."""
    at = np.arange(words.shape[0] * 32 // bits) * bits
    stream = np.concatenate([words.astype(np.uint32), np.zeros((1, words.shape[1]), np.uint32)]).astype(np.uint64)
    pairs = stream[at // 32] | stream[at // 32 + 1] << np.uint64(32)
    found: NDArray[np.int32] = (pairs >> (at % 32).astype(np.uint64)[:, None] & np.uint64(2**bits - 1)).astype(np.int32)
    return found
