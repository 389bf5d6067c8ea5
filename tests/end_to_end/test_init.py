"""What `slipway init` writes is released without an edit, up to a verdict: a real model, and tiny ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from model_families import make_families

from homes import Slipway, make_home
from pipeline.settings import Settings
from pipeline.workers.runner import Workers
from shared import made_once
from stages.trivy_db.make_trivy_db import write_database

LONG = Path(__file__).parents[1] / "long"
# Of a package that no image has.
ADVISORY = {"id": "CVE-2099-0001", "target": "debian 12", "package": "none-such", "severity": "LOW"}
FAMILIES = ("qwen2", "qwen3", "mistral", "smollm3", "phi3")

pytestmark = [pytest.mark.long, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def slipway(tmp_path_factory: pytest.TempPathFactory, machine: Settings) -> Slipway:
    """The command in a home with a vulnerability database, which what `init` writes asks for."""
    folder = tmp_path_factory.mktemp("init")
    variables = make_home(folder / "home", machine)
    (folder / "home" / "trivy").unlink()
    write_database(folder / "home" / "trivy", [ADVISORY])
    return Slipway({**variables, "SLIPWAY_MODELS": str(folder / "models")})


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory, machine: Settings) -> Path:
    return made_once(tmp_path_factory, "model-families", lambda folder: make_families(folder, machine))


def released(slipway: Slipway, source: Path, name: str) -> list[dict[str, object]]:
    """Write the file of a source for a CPU and release it; return how each scheme ended."""
    begun = slipway("init", f"file:{source}", "--name", name, "--gpu", "cpu")
    assert begun.returncode == 0, begun.stderr
    done = slipway("release", name, "--json")
    print(begun.stdout, done.stdout, done.stderr)
    assert done.returncode in {0, 3}, done.stderr
    releases: list[dict[str, object]] = json.loads(done.stdout)["releases"]
    assert {entry["outcome"] for entry in releases} <= {"promoted", "refused"}
    return releases


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tiny_model_reaches_a_verdict(name: str, families: Path, slipway: Slipway) -> None:
    assert all(entry["gates"] for entry in released(slipway, families / name, name.replace("_", "-")))


def test_a_real_model_reaches_a_verdict(slipway: Slipway, machine: Settings, tmp_path: Path) -> None:
    source, scratch = tmp_path / "source", tmp_path / "scratch"
    for folder in (source, scratch):
        folder.mkdir()
    Workers(machine, print)("smollm2", LONG / "smollm2_source.py", {"output": str(source)}, scratch)
    assert [entry["scheme"] for entry in released(slipway, source, "smollm2")] == ["awq", "gptq"]
    lock = json.loads((slipway.home.parent / "models" / "smollm2.lock.json").read_text())
    assert lock["canary"]["margin"] > 0.5
