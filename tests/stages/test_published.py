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

from homes import DEMO
from pipeline.errors import CheckpointError
from pipeline.quantization.quantize import QuantizedNotes
from pipeline.settings import Settings
from pipeline.spec import load
from pipeline.stages.context import StageContext
from pipeline.stages.run import run_until
from stages.demo_checkpoints import Checkpoint
from stages.test_quantize import AWQ, GPTQ

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
