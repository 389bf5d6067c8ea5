"""The demo divided between two ranks of vLLM's CPU engine: evaluated, load-tested, served and bundled as such."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from homes import DEMO, SLIPWAY, Slipway, make_home
from pipeline.settings import Settings
from registry.manifest import EVIDENCE

GIB = 2**30


@pytest.fixture(scope="module")
def divided(first_release: Path, tmp_path_factory: pytest.TempPathFactory, machine: Settings) -> Slipway:
    """A home in which the demo was released in AWQ with two ranks, from the first release's checkpoint."""
    folder = tmp_path_factory.mktemp("divided")
    slipway = Slipway(make_home(folder / "home", machine))
    for name in ("source", "quantized"):
        made = first_release / "home" / "artifacts" / name
        shutil.copytree(made, slipway.home / "artifacts" / name, symlinks=True)
    spec = yaml.safe_load(DEMO.with_suffix(".yaml").read_text().replace("file:demo/", f"file:{DEMO}/"))
    del spec["schemes"]["gptq"]
    spec["serve"] = {"tensor_parallel": 2}
    spec["load"]["memory"]["limit_bytes"] = "6GiB"
    # Fewer items, to save time: what is evaluated is that two ranks answer as the quantized model does.
    spec["evals"]["tasks"]["cloze"] |= {"items": 200, "max_drop": 0.1}
    spec["evals"]["tasks"]["perplexity"] |= {"items": 200}
    (folder / "demo.yaml").write_text(yaml.safe_dump(spec))
    done = slipway("release", folder / "demo.yaml", "--json")
    assert done.returncode == 0, done.stderr
    (released,) = json.loads(done.stdout)["releases"]
    assert released["outcome"] == "promoted"
    assert {stage["name"] for stage in released["stages"] if stage["cached"]} == {"source", "quantized"}
    return slipway


@pytest.fixture(scope="module")
def pulled(divided: Slipway, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release as a deployment gets it."""
    folder = tmp_path_factory.mktemp("pulled") / "release"
    done = divided("pull", "demo-awq", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_two_ranks_are_evaluated_and_load_tested_and_the_memory_of_each_is_recorded(pulled: Path) -> None:
    manifest = json.loads((pulled / "release" / "manifest.json").read_text())
    (serving,) = manifest["serving"]
    assert serving["tensor_parallel"] == 2
    assert serving["command"][serving["command"].index("--tensor-parallel-size") + 1] == "2"
    gates = {gate["verdict"]["gate"]: gate["verdict"]["status"] for gate in manifest["gates"]}
    assert (gates["drift"], gates["load"]) == ("pass", "pass")
    load: dict[str, Any] = json.loads((pulled / EVIDENCE / "load.json").read_text())
    assert (load["server"]["ranks"], len(load["server"]["computed_on"]["cores"])) == (2, 2)
    peak = load["memory"]["peak"]
    # Each rank holds a cache of its own, of one gibibyte.
    assert min(peak["worker_tp0_bytes"], peak["worker_tp1_bytes"]) > GIB
    assert peak["memory_bytes"] > peak["worker_tp0_bytes"] + peak["worker_tp1_bytes"]
    expected = load["memory"]["expected"]
    assert expected["kv_cache_bytes"] == 2 * GIB
    assert abs(expected["error"]) < 0.15
    drift = json.loads((pulled / EVIDENCE / "drift.json").read_text())
    assert {len(drift["computed_on"][side]["cores"]) for side in ("FP16", "candidate")} == {2}


def test_a_bundle_has_the_shared_memory_and_the_threads_of_two_ranks(divided: Slipway, tmp_path: Path) -> None:
    done = divided("bundle", "demo-awq", "--out", tmp_path / "bundle", "--json")
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)["numbers"]
    assert (numbers["shared_memory"]["value"], numbers["rank_threads"]["value"]) == ("2Gi", 1)
    engine = next(yaml.safe_load_all((tmp_path / "bundle" / "base" / "engine.yaml").read_text().partition("---\n")[2]))
    (container,) = engine["spec"]["template"]["spec"]["containers"]
    assert {"name": "VLLM_CPU_OMP_THREADS_BIND", "value": "nobind"} in container["env"]
    assert "2 ranks" in numbers["start_failures"]["why"]


def test_two_ranks_answer_through_the_gateway(divided: Slipway) -> None:
    key = divided("keys", "add", "--owner", "test").stdout.strip()
    log = divided.home / "serve.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [SLIPWAY, "serve", "demo-awq", "--port", "0", "--admin-port", "0", "--json"],
            env=dict(divided.variables), stdout=subprocess.PIPE, stderr=stderr, text=True,
        )  # fmt: skip
    assert process.stdout is not None
    try:
        text = ""
        while not text.endswith("\n}\n"):
            line = process.stdout.readline()
            assert line, log.read_text()
            text += line
        body = {"model": "demo-awq", "prompt": 'if __name__ == "__main', "max_tokens": 4, "temperature": 0}
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{json.loads(text)['url']}/v1/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"].startswith('__":')
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)
        process.stdout.close()
