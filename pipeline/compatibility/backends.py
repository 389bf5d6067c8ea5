"""What each backend can quantize: its architectures, and the linears of a layer that it packs (``backends.json``).

The table is made by ``list_backend_models.py``, run in the backends' own environments; when one gets other pins, run it
again. A backend can do a model if it packs every linear of its layers under the name that the source has for it, and
no router.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.errors import QuantizeError

_TABLE = Path(__file__).with_name("backends.json")
# Backends by method, the one to recommend first.
METHODS: Mapping[str, tuple[str, ...]] = {
    "awq": ("gptqmodel", "autoawq"),
    "gptq": ("gptqmodel", "autogptq"),
    **dict.fromkeys(("fp8", "fp8-block", "w8a8", "w4a16", "nvfp4", "mxfp4"), ("llmcompressor",)),
}
# The bits that a backend writes of a method; of a mixture the least.
BITS: Mapping[tuple[str, str], tuple[int, ...]] = {
    ("awq", "autoawq"): (4,),
    ("awq", "gptqmodel"): (4,),
    ("gptq", "gptqmodel"): (2, 3, 4, 8),
    ("gptq", "autogptq"): (2, 3, 4, 8),
    **{(method, "llmcompressor"): (8,) for method in ("fp8", "fp8-block", "w8a8")},
    **{(method, "llmcompressor"): (4,) for method in ("w4a16", "nvfp4", "mxfp4", "mixed")},
}
# What each method's format and kernels know; -1 is one group over a whole input.
GROUP_SIZES: Mapping[str, tuple[int, ...]] = {
    "awq": (32, 64, 128),
    "gptq": (-1, 16, 32, 64, 128, 256),
    "fp8": (-1,),
    "fp8-block": (128,),
    "w8a8": (-1,),
    "w4a16": (32, 64, 128),
    "nvfp4": (16,),
    "mxfp4": (32,),
    "mixed": (-1,),
}
# Methods whose backend reads the weights alone: it knows no architecture, and needs none.
WITHOUT_MODEL = frozenset({"fp8", "fp8-block", "mxfp4"})
# Backends that stopped at transformers 4.51.
ARCHIVED = frozenset({"autoawq", "autogptq"})
ON_GPUS_ALONE = frozenset({"autogptq"})


class KnownArchitecture:
    """One architecture as a backend knows it."""

    def __init__(self, entry: Mapping[str, Any]) -> None:
        """Take the table's ``entry``."""
        self._linears = frozenset(entry["linears"])
        self.experts_key: str | None = entry.get("experts")

    def packs(self, name: str) -> bool:
        """Whether the backend quantizes the linear ``name`` of a layer (``mlp.experts.7.up_proj``)."""
        return name in self._linears or re.sub(r"(?<=\.)\d+(?=\.)", "#", name) in self._linears


def known_architecture(backend: str, architecture: str) -> KnownArchitecture | None:
    """What ``backend`` knows of a ``model_type``, or None."""
    entry = _table()[backend]["models"].get(architecture)
    return None if entry is None else KnownArchitecture(entry)


def transformers_version(backend: str) -> str:
    """The version of transformers in the backend's environment."""
    return str(_table()[backend]["transformers"])


def is_supported(architecture: str) -> bool:
    """Whether transformers itself has the code of a ``model_type``, so that none has to come with the model."""
    return any(architecture in backend["models"] for backend in _table().values())


def ties_embeddings(architecture: str) -> bool:
    """Whether an architecture's class ties the output head to the embedding where config.json says nothing."""
    return bool(_table()["gptqmodel"]["models"].get(architecture, {}).get("tied", False))


def older_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Say what transformers 5 writes in the words of 4.51, which would take its default for what it doesn't find.

    Raises:
        QuantizeError: it can't be said.
    """
    older = dict(config)
    if "dtype" in older:
        older.setdefault("torch_dtype", older.pop("dtype"))
    rope = older.pop("rope_parameters", None)
    if rope is None:
        return older
    if not isinstance(rope, dict) or not isinstance(rope.get("rope_theta"), int | float):
        raise QuantizeError("`rope_parameters` in config.json differ by layer, which its transformers can't read")
    older["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return older


@cache
def _table() -> Mapping[str, Any]:
    table: dict[str, Any] = json.loads(_TABLE.read_text())
    return table
