"""The ``quantization_config`` of a compressed-tensors checkpoint, for the workers that write one.

It has only keys that two versions of compressed-tensors read: 0.17, which vLLM has, and 0.19, which llm-compressor has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.quantization.mixture import FormatOfLayers
    from pipeline.quantization.quantize import QuantizationRequest

_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True}
_CHANNEL, _TOKEN = {"strategy": "channel", "dynamic": False}, {"strategy": "token", "dynamic": True}
_E4M3, _E8M0 = {"scale_dtype": "torch.float8_e4m3fn"}, {"scale_dtype": "torch.uint8"}


def quantization_config(request: QuantizationRequest) -> dict[str, Any]:
    """Say how the layers of a `QuantizationRequest` are stored, and which are not quantized."""
    formats = request["mixture"] or [_of_all_layers(request)]
    groups = [_group(each) for each in formats]
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": groups[0]["format"] if len(groups) == 1 else "mixed-precision",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": request["ignored"],
        "kv_cache_scheme": cache_scheme() if request["kv_cache"] else None,
    }


def _of_all_layers(request: QuantizationRequest) -> FormatOfLayers:
    return {
        "method": request["method"],
        "bits": request["bits"],
        "group_size": request["group_size"],
        "layers": ["Linear"],
    }


def cache_scheme() -> dict[str, Any]:
    """FP8 for keys and values, a scale for each layer's."""
    return {**_FLOAT8, "strategy": "tensor", "dynamic": False}


def layer_settings(method: str, bits: int, size: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The settings of weights and of the layers' inputs in one format; None where inputs stay at 16 bits."""
    return _settings(method, bits, size)[1:]


def _group(each: FormatOfLayers) -> dict[str, Any]:
    stored_as, weights, inputs = _settings(each["method"], each["bits"], each["group_size"])
    return {"targets": each["layers"], "format": stored_as, "weights": weights, "input_activations": inputs}


def _settings(method: str, bits: int, size: int) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """The format's name, and the settings of weights and of the layers' inputs."""
    group = {"strategy": "group", "group_size": size}
    match method:
        case "fp8":
            return "float-quantized", _FLOAT8 | _CHANNEL, _FLOAT8 | _TOKEN
        case "fp8-block":
            block = {"strategy": "block", "block_structure": [size, size], "dynamic": False}
            return "float-quantized", _FLOAT8 | block, _FLOAT8 | group | {"dynamic": True}
        case "w8a8":
            return "int-quantized", _INT8 | _CHANNEL, _INT8 | _TOKEN
        case "w4a16":
            return "pack-quantized", {**_INT8, "num_bits": bits, **group, "dynamic": False}, None
        case "nvfp4":
            micro = _FLOAT4 | _E4M3 | {"strategy": "tensor_group", "group_size": size}
            return "nvfp4-pack-quantized", micro | {"dynamic": False}, micro | {"dynamic": "local"}
        case "mxfp4":
            micro = _FLOAT4 | _E8M0 | group
            return "mxfp4-pack-quantized", micro | {"dynamic": False}, micro | {"dynamic": True}
    raise ValueError(f"no such method: {method}")
