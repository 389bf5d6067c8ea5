"""A mixture: each layer in one of several formats of compressed-tensors, or at 16 bits (``mixed-precision``).

``quantization_config`` has a group for each format, whose ``targets`` are the names of its layers and whose ``format``
is that of one format's checkpoint; ``ignore`` names the layers that stay at 16 bits. vLLM chooses each layer's kernel
by the group that names it (``compressed_tensors.py: get_scheme``, 0.32).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pipeline.quantization.formats import fp8, int8, pack_quantized
from pipeline.quantization.formats.checkpoint_format import LayerFormat

if TYPE_CHECKING:
    from pipeline.compatibility.scheme import Scheme

REST_DTYPE: str | None = None
_FORMATS: Mapping[str, LayerFormat] = {"w4a16": pack_quantized, "w8a8": int8, "fp8": fp8}


def config_problems(stated: Mapping[str, Any], scheme: Scheme) -> Iterator[str]:
    """See `CheckpointFormat`."""
    groups = stated.get("config_groups")
    if not isinstance(groups, dict):
        yield "config.json: `quantization_config.config_groups` is missing"
        return
    seen: set[str] = set()
    for name, group in groups.items():
        targets = group.get("targets") if isinstance(group, dict) else None
        if not isinstance(targets, list) or not all(isinstance(each, str) for each in targets):
            yield f"config.json: `quantization_config.config_groups.{name}` names no layers"
            continue
        if _scheme_of(stated, group, scheme) is None:
            yield f"config.json: `quantization_config.config_groups.{name}` follows none of the scheme's `formats`"
        yield from (f"config.json: `{each}` is in two groups" for each in sorted(seen.intersection(targets)))
        seen.update(targets)
    if stated.get("format") != "mixed-precision" and len(groups) != 1:
        yield f"config.json: `quantization_config.format` is {stated.get('format')!r}, expected 'mixed-precision'"


def rescales(scheme: Scheme) -> bool:  # noqa: ARG001 - the Protocol's
    """See `CheckpointFormat`."""
    return False


def read_schemes(stated: Mapping[str, Any], scheme: Scheme) -> dict[str, Scheme]:
    """Each quantized layer's own scheme, as the checkpoint's ``quantization_config`` states it."""
    found: dict[str, Scheme] = {}
    groups = stated.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        own = _scheme_of(stated, group, scheme) if isinstance(group, dict) else None
        targets = group.get("targets") if own is not None else None
        if own is not None and isinstance(targets, list):
            found |= {str(name): own for name in targets}
    return found


def _scheme_of(stated: Mapping[str, Any], group: Mapping[str, Any], scheme: Scheme) -> Scheme | None:
    """The one of the mixture's formats that a group's settings are those of."""
    alone = {**stated, "format": group.get("format"), "config_groups": {"group": {**group, "targets": ["Linear"]}}}
    for own in scheme.mixed_schemes.values():
        if not any(_FORMATS[own.method].config_problems(alone, own)):
            return own
    return None
