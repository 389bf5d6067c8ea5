"""A real model, SmolLM2-135M-Instruct, released in both schemes (`make test-long`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from homes import DEMO, Slipway, make_home
from pipeline.settings import Settings
from pipeline.workers.runner import Workers

LONG = Path(__file__).parents[1] / "long"
PARAMETERS = 134_515_008

pytestmark = [pytest.mark.long, pytest.mark.timed, pytest.mark.timeout(7200)]


@pytest.fixture
def spec(tmp_path: Path, machine: Settings) -> Path:
    """The model's file, beside the source that the package gives."""
    source, scratch = tmp_path / "source", tmp_path / "scratch"
    source.mkdir()
    scratch.mkdir()
    request = {"output": str(source)}
    assert Workers(machine, print)("smollm2", LONG / "smollm2_source.py", request, scratch) == {
        "parameters": PARAMETERS
    }
    path = tmp_path / "smollm2.yaml"
    path.write_text((LONG / "smollm2.yaml").read_text().replace("SOURCE", str(source)).replace("DEMO", str(DEMO)))
    return path


def test_it_is_released_in_both_schemes(
    spec: Path, machine: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slipway = Slipway(make_home(tmp_path / "home", machine))
    assert json.loads((spec.parent / "source" / "config.json").read_text()).get("quantization_config") is None
    done = slipway("release", spec, "--json")
    with capsys.disabled():  # the README's figures
        print(done.stdout)
    assert done.returncode == 0, done.stderr
    releases = json.loads(done.stdout)["releases"]
    assert [entry["scheme"] for entry in releases] == ["awq", "gptq"]
    for entry in releases:
        assert entry["outcome"] == "promoted"
        gates = {gate["name"]: gate["status"] for gate in entry["gates"]}
        assert gates == {"drift": "pass", "scan": "inconclusive", "load": "pass"}
