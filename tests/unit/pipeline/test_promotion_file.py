"""Which file in Git is a release line's, and whether it is behind, read from a registry that says something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from mlflow_tables import write_tables

from homes import DEMO
from pipeline.publishing.promotion_file import is_behind, spec_of_line
from pipeline.settings import Settings
from pipeline.spec import GitFile
from registry.backend import MODEL_TAG, Line
from registry.journal import PREFIX

GIT = {"repository": "/srv/clusters.git", "path": "prod/{release}.yaml"}


def settings(folder: Path, tags: dict[str, str]) -> Settings:
    """A home with the models `demo` and `other`, and a registry with the line `demo-gptq`."""
    models = folder / "models"
    models.mkdir()
    (models / "demo").symlink_to(DEMO)
    for model in ("demo", "other"):
        spec = {**yaml.safe_load(DEMO.with_suffix(".yaml").read_text()), "model": model, "registry": {"git": GIT}}
        (models / f"{model}.yaml").write_text(yaml.safe_dump(spec))
    uri = write_tables(folder / "mlflow.db", Line("demo-gptq", {"champion": "1"}, tags), {"1": f"sha256:{'a' * 64}"})
    return Settings.read({"SLIPWAY_HOME": str(folder), "SLIPWAY_MODELS": str(models), "MLFLOW_TRACKING_URI": uri})


@pytest.mark.parametrize(
    ("model", "expected"), [("demo", "demo"), ("other", None), ("gone", None), ("../models/other", None)]
)
def test_a_line_follows_the_file_of_its_own_model_alone(tmp_path: Path, model: str, expected: str | None) -> None:
    found = spec_of_line("demo-gptq", settings(tmp_path, {MODEL_TAG: model}))
    assert (found and found.model) == expected


def test_a_damaged_trail_does_not_say_that_the_file_has_the_champion(tmp_path: Path) -> None:
    """So it is reported as that line's error, and does not keep other lines' files from being pushed."""
    damaged = settings(tmp_path, {f"{PREFIX}000001": "{}"})
    assert is_behind("demo-gptq", GitFile.model_validate(GIT), damaged)
