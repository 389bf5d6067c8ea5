"""What the README tells a newcomer to type is what the code takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pipeline.cli import main
from pipeline.settings import CHECKOUT
from pipeline.spec import Automation, load

README = (CHECKOUT / "README.md").read_text()


def test_the_example_of_a_model_file_is_a_model_file(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    for name in re.findall(r"file:([\w.]+)", example):
        (tmp_path / name).write_text("{}\n")
    path = tmp_path / "llama-3.1-8b-instruct.yaml"
    path.write_text(example)
    assert list(load(path).schemes) == ["awq", "gptq"]


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`slipway ([a-z]+)", README))))
def test_every_command_it_names_exists(command: str) -> None:
    assert command in main.commands


def test_every_setting_is_in_a_table_of_a_readme() -> None:
    read = set(re.findall(r'environment(?:\.get\(|\[)"([A-Z_]+)"', (CHECKOUT / "pipeline/settings.py").read_text()))
    told = README + (CHECKOUT / "pipeline" / "README.md").read_text()
    assert read <= set(re.findall(r"`([A-Z_]+)`", told))


def test_the_example_of_automation_is_one() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", (CHECKOUT / "pipeline" / "README.md").read_text(), re.DOTALL)
    assert set(yaml.safe_load(example)["automation"]) == set(Automation.model_fields)
    Automation.model_validate(yaml.safe_load(example)["automation"])
