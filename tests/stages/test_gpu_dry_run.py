"""The prepared run on a GPU, dry: carried wheels beside a Python with torch, and Slipway's own workers on them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.document import GpuRun, Inference
from checkout import CHECKOUT
from pipeline.settings import Settings
from pipeline.workers.environments import ensure_environment

FOLDERS = ("benchmarks", "containers", "evals", "models", "pipeline", "registry", "requirements")


@pytest.mark.long
def test_a_dry_run_quantizes_and_loads_with_what_is_carried(machine: Settings, tmp_path: Path) -> None:
    for name in FOLDERS:
        shutil.copytree(CHECKOUT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-m", "benchmarks.gpu.wheels"], cwd=tmp_path, env=variables, check=True)
    # Stands for the GPU machine's: torch, numpy, pandas, pyarrow, pillow; what is carried goes before what else it has.
    python = ensure_environment("gptqmodel", machine, print) / "bin" / "python"
    parts = ["environments", "gptq by autogptq", "w4a16 by llmcompressor", "kernels of w4a16 by llmcompressor"]
    out = tmp_path / "gpu.json"
    command = ["bash", "benchmarks/gpu.sh", "--dry-run", "--out", str(out), *parts]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHON": str(python)}, check=True)
    document = GpuRun.model_validate_json(out.read_text())
    assert [each.part for each in document.parts] == parts
    assert [each.status for each in document.parts] == ["ok", "skipped", "ok", "ok"]
    assert document.carried_bytes < 60 << 20
    found = document.parts[-1].found
    assert isinstance(found, Inference)
    assert (found.device, found.layers) == ("cpu", {"Linear": 28})
