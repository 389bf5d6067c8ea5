"""The demo with a draft model: its own weights, which are nearly always right, and a head of EAGLE-3 that never is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from draft_models import write_head
from serve_command import serving

from evals.load.evidence import read_load_evidence
from homes import DEMO, Slipway, make_home
from pipeline.settings import Settings
from registry.manifest import EVIDENCE, REPORT, Manifest

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=["draft", "eagle3"])
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def slipway(method: str, first_release: Path, tmp_path_factory: pytest.TempPathFactory, machine: Settings) -> Slipway:
    """A home in which the demo was released in GPTQ with a draft model, from the first release's artifacts."""
    folder = tmp_path_factory.mktemp(method)
    slipway = Slipway(make_home(folder / "home", machine))
    for name in ("artifacts", "keys"):
        shutil.copytree(first_release / "home" / name, slipway.home / name, symlinks=True)
    if method == "draft":
        shutil.copytree(DEMO / "model", folder / "draft")
    else:
        write_head(folder / "draft", json.loads((DEMO / "model" / "config.json").read_text()))
    spec = yaml.safe_load(DEMO.with_suffix(".yaml").read_text().replace("file:demo/", f"file:{DEMO}/"))
    spec |= {"model": "drafted", "schemes": {"gptq": spec["schemes"]["gptq"]}}
    spec["serve"] = {"speculative": {"method": method, "source": {"uri": "file:draft"}, "tokens": 4}}
    # What counts is that nothing changes but the speed, which depends on what else the cores do.
    spec["load"] |= {"slo": {"p95_latency_ms": 60_000, "error_rate": 0.0}}
    (folder / "drafted.yaml").write_text(yaml.safe_dump(spec))
    done = slipway("release", folder / "drafted.yaml", "--json")
    assert done.returncode == 0, done.stderr
    (released,) = json.loads(done.stdout)["releases"]
    assert released["outcome"] == "promoted"
    made = {stage["name"] for stage in released["stages"] if not stage["cached"]}
    assert made == {"image", "drift", "scan", "load", "variants", "release"}  # FP16 is not asked again
    assert (folder / "drafted.draft_model.lock.json").exists()
    return slipway


@pytest.fixture(scope="module")
def pulled(slipway: Slipway, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pulled") / "drafted"
    done = slipway("pull", "drafted-gptq", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_answers_are_those_without_it_and_its_tokens_are_counted(method: str, pulled: Path) -> None:
    load = read_load_evidence(pulled / EVIDENCE)
    found = load.speculation
    assert found is not None
    print(found)
    assert found.wrong is None
    assert found.single.equal == found.single.answers == 24
    assert found.acceptance_rate is not None
    assert found.acceptance_rate > 0.7 if method == "draft" else found.acceptance_rate < 0.1
    assert load.server.report is not None
    assert load.server.report.speculative == {"draft": "draft_model"}.get(method, method)
    assert load.server.not_applied == []
    assert load.memory.expected is not None
    assert abs(load.memory.expected.error or 1) < 0.15


def test_it_is_a_layer_of_its_own_and_verified_like_the_weights(slipway: Slipway, pulled: Path) -> None:
    manifest = Manifest.parse((pulled / "release" / "manifest.json").read_bytes())
    assert manifest.draft_model is not None
    assert {"config.json", "model.safetensors"} == manifest.draft_model.files.keys()
    image = json.loads((pulled / EVIDENCE / "image.json").read_text())
    layers = [layer["holds"] for layer in image["layers"] if layer["holds"].startswith("draft_model ")]
    assert layers == ["draft_model config.json and 1 more"]
    size = sum(record.size for name, record in manifest.files.items() if name.endswith(".safetensors"))
    assert size <= int(image["labels"]["slipway.model.bytes"]) < size + 10_000  # the layer has headers
    assert "draft model" in (pulled / REPORT).read_text()
    weights = pulled / "draft_model" / "model.safetensors"
    assert slipway("verify", pulled).returncode == 0
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    spoiled = slipway("verify", pulled)
    assert spoiled.returncode != 0
    assert "draft_model/model.safetensors" in spoiled.stderr + spoiled.stdout


def test_it_is_served(slipway: Slipway) -> None:
    with serving(slipway, "drafted-gptq") as served:
        assert served.complete('if __name__ == "__main', max_tokens=4).startswith('__":')
