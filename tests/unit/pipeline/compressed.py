"""The tiny model of `checkpoints` in the formats of compressed-tensors, encoded here with numpy alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from evals.drift.mixture import UNQUANTIZED
from pipeline.compatibility.scheme import Scheme
from pipeline.quantization.quantizers.compressed_tensors_config import quantization_config
from unit.pipeline import checkpoints

# Dtype as the safetensors library names it, and the numbers or bytes.
Stored = dict[str, tuple[str, NDArray[Any]]]

# A layer in each format that a mixture can have, and one at 16 bits.
MIXED = {
    **dict.fromkeys(checkpoints.linears(), "w4a16"),
    "model.layers.0.mlp.down_proj": "fp8",
    "model.layers.1.mlp.down_proj": "w8a8",
    "model.layers.1.mlp.up_proj": UNQUANTIZED,
}

_E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
_E4M3 = [0.0, *(i / 8 * 2.0**-6 for i in range(1, 8)), *((1 + i % 8 / 8) * 2.0 ** (i // 8 - 7) for i in range(8, 127))]


def scheme(method: str, **more: object) -> Scheme:
    return Scheme.model_validate({"method": method, "backend": "llmcompressor", **more})


def _scheme(method: str) -> Scheme:
    return scheme(method, **({"group_size": 32} if method == "w4a16" else {}))


def write(folder: Path, method: str, tensors: Stored | None = None, **stated: object) -> Path:
    """Write a checkpoint's folder, with ``tensors`` in place of sound ones, and keys of the configuration changed."""
    said = _scheme(method)
    request: Any = {**said.model_dump(), "kv_cache": None, "ignored": ["lm_head", "model.embed_tokens"], "mixture": ()}
    return _write(folder, quantization_config(request) | stated, tensors or quantized(method))


def write_mixed(
    folder: Path, formats: Mapping[str, str], stated: Mapping[str, str] | None = None, tensors: Stored | None = None
) -> Path:
    """Write a mixture's folder: each layer in the format that ``formats`` names; the configuration may say another."""
    said = stated or formats
    groups = {method: sorted(name for name in said if said[name] == method) for method in sorted({*said.values()})}
    kept = groups.pop(UNQUANTIZED, [])
    mixture = [{**_scheme(method).model_dump(), "layers": layers} for method, layers in groups.items()]
    request: Any = {"kv_cache": None, "ignored": ["lm_head", "model.embed_tokens", *kept], "mixture": mixture}
    return _write(folder, quantization_config(request), tensors or mixed_tensors(formats))


def mixed_tensors(formats: Mapping[str, str]) -> Stored:
    """All tensors of the model, each layer as ``formats`` says."""
    source = checkpoints.unquantized()
    found: Stored = {}
    for name, values in source.items():
        layer = name.removesuffix(".weight")
        if formats.get(layer, UNQUANTIZED) == UNQUANTIZED:
            found[name] = ("float16", values)
        else:
            parts = encode(formats[layer], values.astype(np.float32))
            found |= {f"{layer}.{part}": stored for part, stored in parts.items()}
    return found


def _write(folder: Path, quantization: Mapping[str, Any], tensors: Stored) -> Path:
    return write_stored(folder, checkpoints.config() | {"quantization_config": dict(quantization)}, tensors)


def write_stored(folder: Path, config: dict[str, Any], tensors: Stored) -> Path:
    """Write a model's folder with tensors of any dtype."""
    checkpoints.write(folder, {}, config)
    stored = {name: (dtype, np.ascontiguousarray(values)) for name, (dtype, values) in tensors.items()}
    described = {
        name: safetensors.TensorSpec(
            dtype=dtype, shape=list(values.shape), data_ptr=values.ctypes.data, data_len=values.nbytes
        )
        for name, (dtype, values) in stored.items()
    }
    (folder / "model.safetensors").write_bytes(safetensors.serialize(described, None))
    return folder


def quantized(method: str) -> Stored:
    """All tensors of the model, each weight rounded to the nearest."""
    return mixed_tensors(dict.fromkeys(checkpoints.linears(), method))


def encode(method: str, weight: NDArray[np.float32]) -> Stored:
    """One layer [out, in]; `w4a16` in groups of 32, `fp8-block` as one square."""
    out, inputs = weight.shape
    groups: NDArray[Any]
    scale: NDArray[Any]
    match method:
        case "fp8":
            scale = (np.abs(weight).max(1, keepdims=True) / 448).astype(np.float16)
            return {"weight": ("float8_e4m3fn", _e4m3(weight / scale)), "weight_scale": ("float16", scale)}
        case "fp8-block":
            scale = np.full((1, 1), np.abs(weight).max() / 448, np.float16)
            return {"weight": ("float8_e4m3fn", _e4m3(weight / scale)), "weight_scale": ("float16", scale)}
        case "w8a8":
            scale = (np.abs(weight).max(1, keepdims=True) / 127).astype(np.float16)
            return {
                "weight": ("int8", np.round(weight / scale).clip(-128, 127).astype(np.int8)),
                "weight_scale": ("float16", scale),
            }
        case "w4a16":
            groups = weight.reshape(out, -1, 32)
            scale = (np.abs(groups).max(2) / 7.5).astype(np.float16)
            values = np.round(groups / scale[:, :, None]).clip(-8, 7).astype(np.int64).reshape(out, -1, 8) + 8
            words = (values << np.arange(0, 32, 4)).sum(2).astype(np.uint32).view(np.int32)
            return {
                "weight_packed": ("int32", words),
                "weight_scale": ("float16", scale),
                "weight_shape": ("int64", np.array([out, inputs])),
            }
        case "nvfp4":
            groups = weight.reshape(out, -1, 16)
            whole = np.float32(448 * 6 / np.abs(weight).max())
            scale = _e4m3(np.abs(groups).max(2) / 6 * whole)
            decoded = np.array(_E4M3, np.float32)[scale] / whole
            return {
                "weight_packed": ("uint8", _pairs(groups / decoded[:, :, None])),
                "weight_scale": ("float8_e4m3fn", scale),
                "weight_global_scale": ("float32", whole.reshape(1)),
                "input_global_scale": ("float32", np.ones(1, np.float32)),
            }
        case "mxfp4":
            groups = weight.reshape(out, -1, 32)
            power = np.floor(np.log2(np.abs(groups).max(2))) - 2
            return {
                "weight_packed": ("uint8", _pairs(groups / 2.0 ** power[:, :, None])),
                "weight_scale": ("uint8", (power + 127).astype(np.uint8)),
            }
    raise AssertionError(method)


def encode_squares(weight: NDArray[np.float32], size: int = 128) -> Stored:
    """One layer [out, in] in FP8 as DeepSeek publishes it, with a scale for each square; borders are cut."""
    starts = [range(0, length, size) for length in weight.shape]
    scale = np.array(
        [[np.abs(weight[row : row + size, at : at + size]).max() / 448 for at in starts[1]] for row in starts[0]],
        np.float32,
    )
    spread = scale.repeat(size, 0).repeat(size, 1)[: weight.shape[0], : weight.shape[1]]
    return {"weight": ("float8_e4m3fn", _e4m3(weight / spread)), "weight_scale_inv": ("float32", scale)}


def decoded(stored: tuple[str, NDArray[Any]]) -> NDArray[Any]:
    """A tensor's numbers, as torch reads them: of FP8 what its bytes stand for."""
    dtype, values = stored
    if dtype != "float8_e4m3fn":
        return values
    magnitude = np.array([*_E4M3, np.nan], np.float32)[values & 127]
    return np.where(values & 128, -magnitude, magnitude)


def _e4m3(values: NDArray[Any]) -> NDArray[np.uint8]:
    return _nearest(values, _E4M3) | np.where(values < 0, 128, 0).astype(np.uint8)


def _pairs(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Four bits each, two in a byte."""
    codes = _nearest(values, _E2M1) | np.where(values < 0, 8, 0).astype(np.uint8)
    codes = codes.reshape(len(values), -1)
    return np.asarray(codes[:, ::2] | codes[:, 1::2] << 4, np.uint8)


def _nearest(values: NDArray[Any], table: list[float]) -> NDArray[np.uint8]:
    known = np.array(table)
    return np.searchsorted((known[1:] + known[:-1]) / 2, np.abs(values)).astype(np.uint8)
