"""Which module describes the format that a scheme writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.quantization.formats import awq, gptq
from pipeline.quantization.formats.checkpoint_format import CheckpointFormat

if TYPE_CHECKING:
    from pipeline.compatibility.scheme import Scheme

_FORMATS: Mapping[str, CheckpointFormat] = {"awq": awq, "gptq": gptq}


def format_of(scheme: Scheme) -> CheckpointFormat:
    """The format that a scheme writes."""
    return _FORMATS[scheme.method]
