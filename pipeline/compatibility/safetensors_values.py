"""Values of safetensors files, read with numpy some rows at a time: also of dtypes that numpy does not have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.compatibility.safetensors_headers import Tensor

_DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F8_E4M3": np.uint8, "U8": np.uint8,
    "I8": np.int8, "BOOL": np.uint8, "I16": np.int16, "U16": np.uint16, "I32": np.int32, "U32": np.uint32,
    "I64": np.int64, "U64": np.uint64,
}  # fmt: skip
_CHUNK_NUMBERS = 1 << 22


def read_rows(tensor: Tensor, rows: slice = slice(None)) -> NDArray[Any]:
    """Values of some ``rows`` (of the first axis) of a tensor, or all; floating-point numbers come as float32.

    Raises:
        ValueError: the dtype is one that is not read.
    """
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"values of {tensor.dtype} are not read")
    dtype = np.dtype(_DTYPES[tensor.dtype])
    first, last, _ = rows.indices(tensor.shape[0]) if tensor.shape else (0, 1, 1)
    row = math.prod(tensor.shape[1:])
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start + first * row * dtype.itemsize)
        raw = np.frombuffer(stream.read((last - first) * row * dtype.itemsize), dtype)
    return _numbers(raw, tensor.dtype).reshape(last - first, *tensor.shape[1:])


def read_columns(tensor: Tensor, columns: slice) -> NDArray[Any]:
    """Values of some ``columns`` of a matrix, as `read_rows` gives them."""
    stored = np.memmap(tensor.file, _DTYPES[tensor.dtype], "r", tensor.start, tensor.shape)
    return _numbers(np.ascontiguousarray(stored[:, columns]), tensor.dtype)


def equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape hold the same bytes, or ``second`` what ``first`` rounds to in float16."""
    if second.dtype not in {first.dtype, "F16"}:
        return False
    return all(np.array_equal(one, other) for one, other in _chunks(first, second))


def _chunks(first: Tensor, second: Tensor) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Both tensors' bytes, or numbers rounded to float16 as their bits, piece by piece."""
    same = first.dtype == second.dtype
    size, other_size = (1, 1) if same else (first.bytes // max(1, math.prod(first.shape)), 2)
    with first.file.open("rb") as one, second.file.open("rb") as other:
        one.seek(first.start)
        other.seek(second.start)
        for at in range(0, first.bytes // size, _CHUNK_NUMBERS):
            count = min(_CHUNK_NUMBERS, first.bytes // size - at)
            here, there = one.read(count * size), other.read(count * other_size)
            if same:
                yield np.frombuffer(here, np.uint8), np.frombuffer(there, np.uint8)
            else:
                with np.errstate(over="ignore"):
                    rounded = _numbers(np.frombuffer(here, _DTYPES[first.dtype]), first.dtype).astype(np.float16)
                yield rounded.view(np.uint16), np.frombuffer(there, np.uint16)


def _numbers(raw: NDArray[Any], dtype: str) -> NDArray[Any]:
    match dtype:
        case "BF16":
            return np.left_shift(raw.astype(np.uint32), 16).view(np.float32)
        case "F8_E4M3":
            decoded: NDArray[np.float32] = _E4M3[raw]
            return decoded
        case "F64" | "F32" | "F16":
            return raw.astype(np.float32)
    return raw


def _e4m3() -> NDArray[np.float32]:
    """The 256 values of OCP's FP8 E4M3: a sign, four bits of exponent with bias 7, three of fraction; 0x7F is NaN."""
    codes = np.arange(256)
    exponent, fraction = codes >> 3 & 15, (codes & 7) / 8
    magnitude = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7))
    magnitude[codes & 127 == 127] = np.nan
    return np.where(codes & 128, -magnitude, magnitude).astype(np.float32)


_E4M3 = _e4m3()
