"""Which module describes the format that a scheme writes, of a whole checkpoint and of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.quantization.formats import (
    awq,
    fp8,
    fp8_block,
    fp8_scale_inv,
    gptq,
    int8,
    mixed,
    mxfp4,
    mxfp4_experts,
    nvfp4,
    pack_quantized,
)
from pipeline.quantization.formats.checkpoint_format import CheckpointFormat, LayerFormat

if TYPE_CHECKING:
    from pipeline.compatibility.scheme import Scheme

_FORMATS: Mapping[str, LayerFormat] = {
    "awq": awq,
    "gptq": gptq,
    "fp8": fp8,
    "fp8-block": fp8_block,
    "w8a8": int8,
    "w4a16": pack_quantized,
    "nvfp4": nvfp4,
    "mxfp4": mxfp4,
    "fp8-scale-inv": fp8_scale_inv,
    "mxfp4-experts": mxfp4_experts,
}


def format_of(scheme: Scheme) -> CheckpointFormat:
    """The format of a scheme's checkpoint."""
    return mixed if scheme.format == "mixed" else _FORMATS[scheme.format]


def layer_format(scheme: Scheme) -> LayerFormat:
    """The format of a layer; of a mixture each layer has a scheme of its own."""
    return _FORMATS[scheme.format]
