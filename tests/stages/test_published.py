"""Checkpoints of the demo that real quantizers made, taken as somebody else's through `source` and `quantized`.

The law: what one of our schemes writes and checks, `method: as-is` takes and checks alike.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from evals.drift import layer_errors
from homes import DEMO
from pipeline.errors import CheckpointError
from pipeline.planner.sources import describe_folder
from pipeline.quantization import published
from pipeline.quantization.formats import mxfp4_experts
from pipeline.quantization.quantize import QuantizedNotes
from pipeline.settings import Settings
from pipeline.spec import load
from pipeline.stages.context import StageContext
from pipeline.stages.run import run_until
from pipeline.workers.runner import Workers
from stages.demo_checkpoints import Checkpoint
from stages.test_quantize import AWQ, GPTQ
from unit.pipeline.test_published import publish

FP8 = {"method": "fp8", "backend": "llmcompressor"}


def context_of(source: Path, folder: Path) -> StageContext:
    """The demo's release of a published checkpoint, compared with the demo."""
    document = yaml.safe_load(DEMO.with_suffix(".yaml").read_text().replace("file:demo/", f"file:{DEMO}/"))
    document |= {"source": {"uri": f"file:{source}"}, "baseline": f"file:{DEMO}/model"}
    path = folder / "demo.yaml"
    path.write_text(yaml.safe_dump(document | {"schemes": {"taken": {"method": "as-is"}}}))
    return StageContext(load(path), "taken", Settings.read({"SLIPWAY_HOME": str(folder / "home")}), print)


@pytest.mark.parametrize("scheme", [AWQ, GPTQ, FP8], ids=lambda scheme: str(scheme["method"]))
def test_what_a_quantizer_wrote_is_taken_as_it_is(
    scheme: dict[str, Any], checkpoint: Callable[[dict[str, Any]], Checkpoint], tmp_path: Path
) -> None:
    made = checkpoint(scheme)
    artifacts = run_until("quantized", context_of(made.folder, tmp_path))
    notes = artifacts["quantized"].noted(QuantizedNotes)
    assert (notes.backend, notes.method, notes.layers) == ("none", made.record.method, made.record.layers)
    assert notes.bits_per_weight == pytest.approx(made.record.bits_per_weight)
    for path in made.folder.iterdir():
        assert (artifacts["quantized"].folder / path.name).read_bytes() == path.read_bytes()


def test_a_damaged_layer_is_refused(checkpoint: Callable[[dict[str, Any]], Checkpoint], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint(GPTQ).folder, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.scales"
    save_file(tensors | {name: (2 * tensors[name]).astype(np.float16)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.down_proj decodes to .* times the source's weights"):
        run_until("quantized", context_of(folder, tmp_path))


def test_the_experts_of_gpt_oss_are_what_transformers_reads(machine: Settings, tmp_path: Path) -> None:
    folder = publish("mxfp4-experts", tmp_path / "published")
    found = published.read(describe_folder(folder).model)
    experts: dict[str, list[Any]] = {}
    for layer in found.packed():
        whole = slice(0, layer.weight.shape[0])
        experts.setdefault(layer.name.partition("[")[0], []).append(mxfp4_experts.decode(layer, whole, found.scheme).T)
    save_file(
        {name: np.ascontiguousarray(np.stack(each)) for name, each in experts.items()},
        tmp_path / "expected.safetensors",
    )
    request = {"checkpoint": str(folder), "expected": str(tmp_path / "expected.safetensors")}
    (tmp_path / "scratch").mkdir()
    script = Path(__file__).with_name("fused_experts.py")
    told = Workers(machine, print)(layer_errors.ENVIRONMENT, script, request, tmp_path / "scratch")
    assert told["differences"] == dict.fromkeys(experts, 0.0)
