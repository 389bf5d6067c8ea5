"""Two-layer models of every family, on disk: as transformers saves them, with the demo's tokenizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from homes import DEMO
from pipeline.settings import Settings
from pipeline.workers.environments import ensure_environment

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def make_families(folder: Path, machine: Settings) -> None:
    """Make a folder for each family, with the names of `make_model_families.py`, in the gptqmodel environment."""
    python = ensure_environment("gptqmodel", machine, print) / "bin" / "python"
    script = Path(__file__).with_name("make_model_families.py")
    subprocess.run([python, script, folder / "families.json", folder], check=True, capture_output=True)
    for model in folder.glob("*/"):
        for name in TOKENIZER:
            shutil.copyfile(DEMO / "model" / name, model / name)
