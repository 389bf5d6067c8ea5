"""What the formats of compressed-tensors share: ``quantization_config``, and numbers of four bits.

The keys are those of ``QuantizationConfig`` (``compressed_tensors/quantization/quant_config.py``, 0.19.0), which vLLM
reads: one group of settings for every linear layer that ``ignore`` does not name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.compatibility.description import ModelDescription
from pipeline.quantization.formats.checkpoint_format import PackedLayer

# What four bits stand for, as E2M1: a sign, two bits of exponent with bias 1, one of fraction.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4 = np.concatenate([_E2M1, -_E2M1])


def config_problems(
    stated: Mapping[str, Any],
    stored_as: str,
    weights: Mapping[str, object],
    activations: Mapping[str, object] | None,
) -> Iterator[str]:
    """Yield where ``quantization_config`` says something else of the format, the weights or the layers' inputs."""
    groups = stated.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    if not isinstance(group, dict):
        yield "config.json: `quantization_config.config_groups` has no single group"
        return
    expected = {"quant_method": "compressed-tensors", "format": stored_as, "quantization_status": "compressed"}
    yield from _stated_otherwise("", stated, expected)
    yield from _stated_otherwise("config_groups.*.", group, {"targets": ["Linear"]})
    for key, values in (("weights", weights), ("input_activations", activations)):
        found = group.get(key)
        if values is None or not isinstance(found, dict):
            if found is not None or values is not None:
                yield from _stated_otherwise("config_groups.*.", group, {key: values})
            continue
        yield from _stated_otherwise(f"config_groups.*.{key}.", found, values)


def rows_config_problems(stated: Mapping[str, Any], stored_as: str, kind: str) -> Iterator[str]:
    """The same for eight bits with a scale for each output, and inputs with one for each token; ``kind`` is theirs."""
    number = {"num_bits": 8, "type": kind, "symmetric": True}
    yield from config_problems(
        stated,
        stored_as,
        {**number, "strategy": "channel", "dynamic": False},
        {**number, "strategy": "token", "dynamic": True},
    )


def decode_rows(layer: PackedLayer, span: slice) -> NDArray[np.float32]:
    """The weights of numbers that are stored one by one, each times its row's scale."""
    decoded: NDArray[np.float32] = layer.read("weight", span) * layer.read("weight_scale", span)
    return decoded


def fp4(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The numbers of [rows, n/2] bytes as [rows, n], the lower four bits first."""
    halves: NDArray[np.float32] = _FP4[np.stack([packed & 15, packed >> 4], axis=-1)]
    return halves.reshape(len(packed), -1)


def cache_scales(model: ModelDescription) -> frozenset[str]:
    """The scales of keys and of values, of each attention that has such layers."""
    parts = [name.rpartition(".") for name in model.linears]
    attentions = {module for module, _, last in parts if last in {"k_proj", "v_proj", "qkv_proj"}}
    return frozenset(f"{module}.{letter}_scale" for module in attentions for letter in "kv")


def _stated_otherwise(prefix: str, stated: Mapping[str, Any], expected: Mapping[str, object]) -> Iterator[str]:
    for key, value in expected.items():
        if stated.get(key) != value:
            yield f"config.json: `quantization_config.{prefix}{key}` is {stated.get(key)!r}, expected {value!r}"
