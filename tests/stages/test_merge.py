"""Adapters merged into the demo by PEFT, held against the formulas in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from homes import DEMO
from pipeline.planner.sources import describe_folder as describe_model
from pipeline.settings import Settings
from pipeline.sources.adapter import describe_folder, refuse_misfit
from pipeline.sources.merge import ENVIRONMENT, merge
from pipeline.spec import load
from pipeline.stages.context import StageContext
from pipeline.stages.run import run_until
from pipeline.store.notes import SourceNotes
from pipeline.workers.runner import Workers

MAKE = Path(__file__).with_name("make_adapter.py")
CONFIGURATIONS: Mapping[str, Mapping[str, Any]] = {
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"q_proj": 8},
        "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 3},
    },
}


def check_formula(base: Path, merged: Path, adapter: Path, configuration: Mapping[str, Any]) -> int:
    """Compare each weight with the formula in float64, and all else byte by byte; return how many weights there were.

    A number of float32 arithmetic may be off by a millionth of what was added up, and rounds from there.
    """
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    matrices = load_file(adapter / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    found = 0
    for name, weight in before.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        down, up = matrices.get(f"{layer}.lora_A.weight"), matrices.get(f"{layer}.lora_B.weight")
        if down is None or up is None:
            assert weight.tobytes() == after[name].tobytes(), name
            continue
        found += 1
        rank = down.shape[0]
        alpha = 3 if configuration.get("alpha_pattern") and "layers.1.mlp.down" in name else configuration["lora_alpha"]
        scale = alpha / (np.sqrt(rank) if configuration.get("use_rslora") else rank)
        down, up = down.astype(np.float64), up.astype(np.float64)
        exact = weight.astype(np.float64) + scale * (up @ down)
        error = 1e-6 * (np.abs(weight.astype(np.float64)) + scale * (np.abs(up) @ np.abs(down)))
        if configuration.get("use_dora"):
            factor = matrices[f"{layer}.lora_magnitude_vector"] / np.linalg.norm(exact, axis=1)
            exact, error = exact * factor[:, None], error * factor[:, None]
        assert (after[name] >= (exact - error).astype(weight.dtype)).all(), name
        assert (after[name] <= (exact + error).astype(weight.dtype)).all(), name
        assert (after[name] == exact.astype(weight.dtype)).mean() > 0.999, name
        assert (after[name] != weight).any(), name
    return found


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_each_weight_is_what_the_formula_says_and_no_other_byte_changes(
    kind: str, machine: Settings, tmp_path: Path
) -> None:
    configuration, base, workers = CONFIGURATIONS[kind], DEMO / "model", Workers(machine, print)
    adapter, output, scratch = tmp_path / "adapter", tmp_path / "output", tmp_path / "scratch"
    for folder in (adapter, output, scratch, scratch / "making"):
        folder.mkdir()
    request = {"model": str(base), "configuration": configuration, "output": str(adapter)}
    workers(ENVIRONMENT, MAKE, request, scratch / "making")
    model, described = describe_model(base).model, describe_folder(adapter, "merged")
    refuse_misfit(described, model, kind, "merged")
    merge(base, model, adapter, described, output, workers, scratch, print)
    layers = 8 if isinstance(configuration["target_modules"], list) else 28
    assert check_formula(base, output, adapter, configuration) == layers


def test_a_model_with_an_adapter_is_merged_once_and_locks_both(machine: Settings, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "envs").symlink_to(machine.home / "envs")
    document = yaml.safe_load(DEMO.with_suffix(".yaml").read_text().replace("file:demo", f"file:{DEMO}"))
    document |= {
        "model": "merged",
        "source": {**document["source"], "adapter": {"uri": f"file:{DEMO}/adapters/manual"}},
    }
    path = tmp_path / "merged.yaml"
    path.write_text(yaml.safe_dump(document))
    context = StageContext(load(path), "gptq", replace(machine, home=home), print)
    made = run_until("source", context)["source"]
    assert check_formula(DEMO / "model", made.folder, DEMO / "adapters/manual", {"lora_alpha": 8}) == 28
    merged = made.noted(SourceNotes).merged
    assert merged is not None
    assert sorted(merged.adapter.files) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (merged.adapter.uri, merged.adapter.rank) == ("file:manual", 4)
    assert merged.base["model.safetensors"] != made.files["model.safetensors"]
    assert merged.base["tokenizer.json"] == made.files["tokenizer.json"]
    assert sorted(each.name for each in tmp_path.glob("*.lock.json")) == [
        "merged.lock.json",
        "merged.merged_adapter.lock.json",
    ]
    assert run_until("source", context)["source"].cached
