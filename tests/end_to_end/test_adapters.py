"""LoRA adapters next to the demo, through a whole release: served, evaluated, load-tested, pulled and verified."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from containers.sandbox import sandbox
from homes import DEMO, Slipway
from pipeline.settings import Settings
from registry.manifest import REPORT, Manifest

ADAPTERS = ("manual", "tests")
FILES = ("adapter_config.json", "adapter_model.safetensors")


def document() -> dict[str, Any]:
    """The demo's file with both adapters, each asked about text of its own kind; few questions, one scheme."""
    spec: dict[str, Any] = yaml.safe_load(DEMO.with_suffix(".yaml").read_text().replace("file:demo/", f"file:{DEMO}/"))
    spec["schemes"] = {"gptq": spec["schemes"]["gptq"]}
    spec["serve"] = {"adapters": {name: {"uri": f"file:{DEMO}/adapters/{name}"} for name in ADAPTERS}}
    own = {"kind": "text", "task": "perplexity", "max_increase": 0.1}
    tasks = {name: {"text": {**own, "data": f"file:{DEMO}/adapters/{name}.jsonl"}} for name in ADAPTERS}
    spec["evals"] |= {"again": 0, "layers": False, "adapters": {name: {"tasks": tasks[name]} for name in ADAPTERS}}
    spec["evals"]["tasks"]["cloze"] |= {"items": 200, "tier": "supporting"}
    spec["evals"]["tasks"]["perplexity"] |= {"items": 200}
    return spec


@pytest.fixture(scope="module")
def model(slipway: Slipway, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "demo.yaml"
    path.write_text(yaml.safe_dump({**document(), "model": "adapted"}))
    return path


@pytest.fixture(scope="module")
def entry(slipway: Slipway, model: Path) -> dict[str, Any]:
    """What the release of the model with its adapters printed."""
    done = slipway("release", str(model), "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["releases"]
    return dict(found)


@pytest.fixture(scope="module")
def pulled(slipway: Slipway, entry: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pulled") / "adapted"
    done = slipway("pull", "adapted-gptq", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def served(pulled: Path, machine: Settings) -> Iterator[str]:
    """The release's image, started as it is."""
    from containers.engine.engine import connect  # noqa: PLC0415 - with the fixture

    image = json.loads((pulled / "release/evidence/image.json").read_text())
    client = connect(machine.docker_host, machine.home)
    with sandbox.serve(
        client, image["image_id"], name="slipway-adapted", home=machine.home, memory_bytes=4 << 30, progress=print
    ) as server:
        yield server.url


def test_each_adapter_is_judged_by_its_own_text_and_load_tested(entry: dict[str, Any], pulled: Path) -> None:
    assert entry["outcome"] == "promoted"
    drift = json.loads((pulled / "release/evidence/drift.json").read_text())
    assert sorted(drift["adapters"]) == sorted(ADAPTERS)
    manifest = Manifest.parse((pulled / "release/manifest.json").read_bytes())
    (verdict,) = (gate.verdict for gate in manifest.gates if gate.verdict.gate == "drift")
    for name in ADAPTERS:
        assert verdict.limits[f"adapter.{name}.text.max_increase"] == 0.1
        assert len(drift["adapters"][name]["tasks"]["text"]["documents"]) == 96
    load = json.loads((pulled / "release/evidence/load.json").read_text())
    assert {name: each["error_rate"] for name, each in load["models"].items()} == dict.fromkeys(
        ("adapted", *ADAPTERS), 0.0
    )
    report = (pulled / REPORT).read_text()
    assert "<h2>LoRA adapters</h2>" in report
    assert all(f"<th>{name}</th>" in report for name in ("adapted", *ADAPTERS))


def test_they_are_part_of_what_is_pulled_and_verified(slipway: Slipway, pulled: Path, model: Path) -> None:
    manifest = Manifest.parse((pulled / "release/manifest.json").read_bytes())
    assert sorted(manifest.adapters) == sorted(ADAPTERS)
    assert manifest.serving[0].adapters == ADAPTERS
    for name in ADAPTERS:
        assert tuple(sorted(manifest.adapters[name].files)) == FILES
        for file in FILES:
            assert (pulled / "adapters" / name / file).read_bytes() == (DEMO / "adapters" / name / file).read_bytes()
        assert json.loads(model.with_name(f"demo.adapter_{name}.lock.json").read_text())["files"].keys() == set(FILES)
    assert slipway("verify", str(pulled)).returncode == 0
    weights = pulled / "adapters" / "tests" / FILES[1]
    whole = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    spoiled = slipway("verify", str(pulled))
    assert spoiled.returncode != 0
    assert "adapters/tests/adapter_model.safetensors" in spoiled.stderr + spoiled.stdout
    weights.write_bytes(whole)


def test_each_has_a_layer_of_its_own(pulled: Path) -> None:
    image = json.loads((pulled / "release/evidence/image.json").read_text())
    held = [layer["holds"] for layer in image["layers"] if layer["holds"].startswith("adapters ")]
    assert held == [f"adapters {name}/adapter_config.json and 1 more" for name in ADAPTERS]


def nats(client: httpx.Client, model: str, name: str) -> float:
    """What a token of an adapter's own kind of text costs a served model."""
    rows = (DEMO / "adapters" / f"{name}.jsonl").read_text().splitlines()[:24]
    body = {"model": model, "prompt": [json.loads(row)["text"] for row in rows], "max_tokens": 0, "echo": True}
    answer = client.post("/v1/completions", json={**body, "logprobs": 1, "temperature": 0}).raise_for_status()
    scores = [score for each in answer.json()["choices"] for score in each["logprobs"]["token_logprobs"][1:]]
    return -sum(scores) / len(scores)


def test_the_image_lists_them_and_each_answers_in_its_own_way(served: str) -> None:
    with httpx.Client(base_url=served, timeout=60, trust_env=False) as client:
        listed = client.get("/v1/models").raise_for_status().json()["data"]
        assert [each["id"] for each in listed] == ["adapted", *ADAPTERS]

        for name in ADAPTERS:
            assert nats(client, name, name) < 0.99 * nats(client, "adapted", name)
        refused = client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/adapters/tests"})
        assert refused.status_code == 404


def test_the_model_itself_answers_beside_an_adapters_requests_as_it_does_alone(served: str) -> None:
    with httpx.Client(base_url=served, timeout=120, trust_env=False) as client, ThreadPoolExecutor(4) as at_once:
        alone = nats(client, "adapted", "tests")
        # A step of the engine takes the last prompts of one request and the first of the next.
        together = list(at_once.map(lambda model: nats(client, model, "tests"), ("manual", "adapted") * 2))
    assert together[1::2] == pytest.approx([alone, alone], rel=0.001)
