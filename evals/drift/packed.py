"""Weights out of packed checkpoints: GPTQ (2, 3, 4, 8 bits) and AWQ's GEMM layout (4 bits), from their formats alone.

Written against the formats that vLLM and transformers read and not against the quantizers' own code, so that a
checkpoint which only its maker can read does not pass. NumPy only; the worker turns results into its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# AWQ's GEMM kernel keeps the eight values of a word in the order 0 2 4 6 1 3 5 7; these places undo it.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
_GPTQ_BITS = (2, 3, 4, 8)


class FormatError(ValueError):
    """A packed format that this module does not read; the message says which it does."""


def unpack_linear(parts: Mapping[str, NDArray[Any]], quantization: Mapping[str, Any]) -> NDArray[np.float32]:
    """Return one linear layer's weight, out by in, in float32.

    ``parts`` holds the layer's tensors by their last name (``qweight``, ``qzeros``, ``scales``, and GPTQ's ``g_idx`` if
    there); ``quantization`` is the checkpoint's ``quantization_config``.

    Raises:
        FormatError: for a method, layout or width that is not read here.
    """
    method, bits = quantization.get("quant_method"), quantization.get("bits")
    if method == "awq":
        layout = str(quantization.get("version") or quantization.get("checkpoint_format") or "gemm").lower()
        if layout != "gemm" or bits != 4:
            raise FormatError(f"AWQ in layout `{layout}` with {bits} bits is not read here: `gemm` with 4 bits is")
        return _awq(parts["qweight"], parts["qzeros"], parts["scales"])
    if method == "gptq":
        layout = str(quantization.get("checkpoint_format") or "gptq").lower()
        if layout not in {"gptq", "gptq_v2"} or bits not in _GPTQ_BITS:
            raise FormatError(f"GPTQ in layout `{layout}` with {bits} bits is not read here: `gptq`, `gptq_v2` are")
        # The first layout stores each zero point less one.
        return _gptq(parts, bits, offset=1 if layout == "gptq" else 0)
    raise FormatError(f"quantization by `{method}` is not read here: `awq` and `gptq` are")


def unpack_words(words: NDArray[np.int32], bits: int) -> NDArray[np.int32]:
    """Return the unsigned ``bits``-wide values of a little-endian bit stream that runs along the first axis.

    ``words`` is (n, m); the result (32 n / bits, m). Widths that don't divide 32 cross the words' borders.
    """
    plain = np.ascontiguousarray(words).view(np.uint32)
    if 32 % bits == 0:
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        values = (plain[:, None, :] >> shifts[None, :, None]) & np.uint32(2**bits - 1)
        return values.reshape(-1, plain.shape[1]).astype(np.int32)
    stream = (plain[:, None, :] >> np.arange(32, dtype=np.uint32)[None, :, None]).astype(np.uint8) & np.uint8(1)
    digits = stream.reshape(-1, bits, plain.shape[1]).astype(np.int32)
    places = (1 << np.arange(bits, dtype=np.int32))[None, :, None]
    return np.asarray((digits * places).sum(axis=1), dtype=np.int32)


def _gptq(parts: Mapping[str, NDArray[Any]], bits: int, offset: int) -> NDArray[np.float32]:
    """W[in, out] = (q - z[group]) * s[group]; q runs along the inputs, z along the outputs."""
    values = unpack_words(parts["qweight"], bits)
    zeros = (unpack_words(np.ascontiguousarray(parts["qzeros"].T), bits).T + offset) & (2**bits - 1)
    scales = parts["scales"].astype(np.float32)
    groups = parts["g_idx"] if "g_idx" in parts else np.arange(len(values)) // (len(values) // len(scales))
    weight = (values - zeros[groups]).astype(np.float32) * scales[groups]
    return np.ascontiguousarray(weight.T)


def _awq(qweight: NDArray[Any], qzeros: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.float32]:
    """W[in, out] = (q - z[group]) * s[group]; both q and z run along the outputs, eight a word in AWQ's order."""
    values, zeros = _awq_words(qweight), _awq_words(qzeros)
    groups = np.arange(len(values)) // (len(values) // len(scales))
    weight = (values - zeros[groups]).astype(np.float32) * scales.astype(np.float32)[groups]
    return np.ascontiguousarray(weight.T)


def _awq_words(words: NDArray[Any]) -> NDArray[np.int32]:
    rows = unpack_words(np.ascontiguousarray(words.T), 4).T
    return np.ascontiguousarray(rows.reshape(len(rows), -1, 8)[:, :, _AWQ_PLACES].reshape(rows.shape))
