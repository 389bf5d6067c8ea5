"""Weights out of quantized checkpoints: AWQ, GPTQ, compressed-tensors, DeepSeek V3's FP8, GPT-OSS's MXFP4.

GPTQ has 2, 3, 4 or 8 bits, AWQ its GEMM layout.
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
# The values of E2M1 by their four bits, the sign first.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4 = np.concatenate([_E2M1, -_E2M1])
_E8M0_BIAS = 127


class FormatError(ValueError):
    """A packed format that this module does not read; the message says which it does."""


def unpack_linear(
    parts: Mapping[str, NDArray[Any]], quantization: Mapping[str, Any], layer: str = ""
) -> NDArray[np.float32]:
    """Return one linear layer's weight, out by in, in float32.

    ``parts`` holds the layer's tensors by their last name (``qweight``, ``qzeros``, ``scales``, and GPTQ's ``g_idx`` if
    there; ``weight`` or ``weight_packed``, ``weight_scale`` and so on of compressed-tensors), FP8 as float32;
    ``quantization`` is the checkpoint's ``quantization_config``, and ``layer`` the layer's name, by which a mixture
    says what format it has.

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
    if method == "compressed-tensors":
        groups = list((quantization.get("config_groups") or {}).values())
        own = [group for group in groups if {layer, "Linear"}.intersection(group.get("targets", ["Linear"]))]
        if len(own) != 1:
            raise FormatError(f"compressed-tensors with {len(own)} groups of settings for `{layer}` is not read here")
        return _compressed(parts, str(own[0].get("format") or quantization.get("format")), own[0]["weights"])
    if method == "fp8" and quantization.get("weight_block_size"):
        return _scaled(parts["weight"], parts["weight_scale_inv"], *quantization["weight_block_size"])
    raise FormatError(
        f"quantization by `{method}` is not read here: `awq`, `gptq`, `compressed-tensors` and `fp8` in blocks are"
    )


def unpack_experts(blocks: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.float32]:
    """Return GPT-OSS's experts, E by in by out, from ``blocks`` [E, out, in/32, 16] and ``scales`` [E, out, in/32]."""
    values = _fp4(blocks.reshape(-1, blocks.shape[-1])) * _powers(scales.reshape(-1, 1))
    return np.ascontiguousarray(values.reshape(*blocks.shape[:2], -1).transpose(0, 2, 1), np.float32)


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


def _compressed(parts: Mapping[str, NDArray[Any]], stored_as: str, settings: Mapping[str, Any]) -> NDArray[np.float32]:
    """W[out, in] = q * s, a scale for each row, square or group; q packed along the inputs where it has four bits."""
    values: NDArray[np.float32]
    scales: NDArray[Any]
    match stored_as:
        case "float-quantized" | "int-quantized":
            values, scales = parts["weight"].astype(np.float32), parts["weight_scale"].astype(np.float32)
        case "pack-quantized":
            bits = int(settings["num_bits"])
            values = unpack_words(parts["weight_packed"].T, bits).T.astype(np.float32) - 2 ** (bits - 1)
            scales = parts["weight_scale"].astype(np.float32)
        case "nvfp4-pack-quantized":
            values = _fp4(parts["weight_packed"])
            scales = parts["weight_scale"] / parts["weight_global_scale"].astype(np.float32)
        case "mxfp4-pack-quantized":
            values = _fp4(parts["weight_packed"])
            scales = _powers(parts["weight_scale"])
        case _:
            raise FormatError(f"compressed-tensors' format `{stored_as}` is not read here")
    rows, columns = (-(-mine // theirs) for mine, theirs in zip(values.shape, scales.shape, strict=True))
    if settings["strategy"] == "block":
        rows, columns = settings["block_structure"]
    return _scaled(values, scales, rows, columns)


def _scaled(values: NDArray[Any], scales: NDArray[Any], rows: int, columns: int) -> NDArray[np.float32]:
    """Each number times the scale of its rectangle."""
    spread = scales.astype(np.float32).repeat(rows, axis=0).repeat(columns, axis=1)
    return np.ascontiguousarray(values * spread[: values.shape[0], : values.shape[1]], np.float32)


def _powers(exponents: NDArray[Any]) -> NDArray[np.float32]:
    """Bytes of E8M0 as numbers."""
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - _E8M0_BIAS, dtype=np.float32)


def _fp4(packed: NDArray[Any]) -> NDArray[np.float32]:
    """[rows, n/2] bytes as [rows, n] numbers, the lower four bits first."""
    return np.asarray(_FP4[np.stack([packed & 15, packed >> 4], axis=-1)], np.float32).reshape(len(packed), -1)


def _awq(qweight: NDArray[Any], qzeros: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.float32]:
    """W[in, out] = (q - z[group]) * s[group]; both q and z run along the outputs, eight a word in AWQ's order."""
    values, zeros = _awq_words(qweight), _awq_words(qzeros)
    groups = np.arange(len(values)) // (len(values) // len(scales))
    weight = (values - zeros[groups]).astype(np.float32) * scales.astype(np.float32)[groups]
    return np.ascontiguousarray(weight.T)


def _awq_words(words: NDArray[Any]) -> NDArray[np.int32]:
    rows = unpack_words(np.ascontiguousarray(words.T), 4).T
    return np.ascontiguousarray(rows.reshape(len(rows), -1, 8)[:, :, _AWQ_PLACES].reshape(rows.shape))
