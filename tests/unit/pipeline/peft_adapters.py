"""Tiny LoRA adapters for tests, in the form that PEFT writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from unit.pipeline.checkpoints import Tensors, linears

RANK = 4


def matrices(rank: int = RANK) -> Tensors:
    """Two matrices for each linear layer of the tiny model."""
    found: Tensors = {}
    for name, (out, inputs) in linears().items():
        found[f"base_model.model.{name}.lora_A.weight"] = np.ones((rank, inputs), np.float16)
        found[f"base_model.model.{name}.lora_B.weight"] = np.ones((out, rank), np.float16)
    return found


def with_magnitudes() -> Tensors:
    """The same with DoRA's vector for each layer."""
    vectors = {f"base_model.model.{name}.lora_magnitude_vector": out for name, (out, _) in linears().items()}
    return matrices() | {name: np.ones(out, np.float16) for name, out in vectors.items()}


def configuration(**changes: Any) -> dict[str, Any]:  # noqa: ANN401
    """An ``adapter_config.json``."""
    modules = sorted({name.rpartition(".")[2] for name in linears()})
    kept = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": modules, "bias": "none"}
    return {**kept, "modules_to_save": None, "use_dora": False, "base_model_name_or_path": "tiny", **changes}


def write(folder: Path, tensors: Tensors | None = None, **changes: Any) -> Path:  # noqa: ANN401
    """Write an adapter's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(matrices() if tensors is None else tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(configuration(**changes)))
    return folder
