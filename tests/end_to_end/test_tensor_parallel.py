"""The demo divided between two ranks of vLLM's CPU engine, with most keys of `serve` set, through a whole release."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from bundle_evidence import engine_container
from serve_command import serving
from serving_keys import CHAT_TEMPLATE, ServingKey, contains, few_tool_calls, read

from containers.image.build import SERVING
from containers.image.serving import DEFAULT
from evals.load.evidence import read_load_evidence
from homes import DEMO, Slipway, make_home
from pipeline.settings import Settings
from registry.manifest import EVIDENCE, REPORT

GIB = 2**30
# All that can be set at once and has a file in `tests/data/serve`, but for what takes another start of vLLM.
KEYS = (
    "arguments", "batched_tokens", "chat_template", "context", "kv_cache", "max_sequences", "prefix_caching",
    "reasoning", "tensor_parallel", "tool_calls",
)  # fmt: skip


@pytest.fixture(scope="module")
def keys(machine: Settings) -> list[ServingKey]:
    """The keys that this CPU supports."""
    return [read(name) for name in KEYS if name != "kv_cache" or machine.cpu.instruction_set != "avx2"]


@pytest.fixture(scope="module")
def divided(
    first_release: Path, tmp_path_factory: pytest.TempPathFactory, machine: Settings, keys: list[ServingKey]
) -> Slipway:
    """A home in which the demo was released in AWQ with these keys, from the first release's checkpoint."""
    folder = tmp_path_factory.mktemp("divided")
    slipway = Slipway(make_home(folder / "home", machine))
    for name in ("source", "adapters", "quantized"):
        made = first_release / "home" / "artifacts" / name
        shutil.copytree(made, slipway.home / "artifacts" / name, symlinks=True)
    spec = yaml.safe_load(DEMO.with_suffix(".yaml").read_text().replace("file:demo/", f"file:{DEMO}/"))
    del spec["schemes"]["gptq"]
    spec["serve"] = {name: value for key in keys for name, value in key.serve.items()}
    # Fewer items, to save time, and wide limits for the KV cache of 8 bits and for two ranks on the cores of another
    # worker's tests: what counts is that two ranks answer as the quantized model does.
    spec["load"] |= {
        "memory": {"limit_bytes": "6GiB"},
        "slo": {"p95_latency_ms": 60_000, "error_rate": 0.0},
        "max_client_late_ms": 30_000,
        "accept_inconclusive": {"memory-unwatched": "The engine can be late with its figures on a busy machine."},
    }
    spec["evals"]["tasks"]["cloze"] |= {"items": 200, "max_drop": 0.1}
    spec["evals"]["tasks"]["perplexity"] |= {"items": 200, "max_increase": 0.1}
    spec["evals"]["tasks"] |= few_tool_calls()
    shutil.copy(CHAT_TEMPLATE, folder)
    (folder / "demo.yaml").write_text(yaml.safe_dump(spec))
    done = slipway("release", folder / "demo.yaml", "--json")
    assert done.returncode == 0, done.stderr
    (released,) = json.loads(done.stdout)["releases"]
    assert released["outcome"] == "promoted"
    assert {stage["name"] for stage in released["stages"] if not stage["cached"]} == set().union(
        *(key.again for key in keys)
    )
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


def test_every_key_reaches_label_manifest_report_and_engine(pulled: Path, keys: list[ServingKey]) -> None:
    manifest = json.loads((pulled / "release" / "manifest.json").read_text())
    (served,) = manifest["serving"]
    label = json.loads(json.loads((pulled / EVIDENCE / "image.json").read_text())["labels"][SERVING])
    report = (pulled / REPORT).read_text()
    server = read_load_evidence(pulled / EVIDENCE).server
    assert server.requested is not None
    assert server.report is not None
    assert server.not_applied == []
    assert server.report.configuration["max_seq_len"] == str(label["context"])
    for key in keys:
        assert contains(served["command"], key.command)
        assert contains(server.requested.arguments, key.command)
        assert " ".join(key.command) in report
        assert label[key.name] != DEFAULT.model_dump(mode="json")[key.name]


def test_a_bundle_has_the_command_the_shared_memory_and_the_threads_of_two_ranks(
    divided: Slipway, pulled: Path, tmp_path: Path
) -> None:
    done = divided("bundle", "demo-awq", "--out", tmp_path / "bundle", "--json")
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)["numbers"]
    assert (numbers["shared_memory"]["value"], numbers["rank_threads"]["value"]) == ("2Gi", 1)
    container = engine_container(tmp_path / "bundle")
    assert container["args"] == json.loads((pulled / "release" / "manifest.json").read_text())["serving"][0]["command"]
    assert {"name": "VLLM_CPU_OMP_THREADS_BIND", "value": "nobind"} in container["env"]
    assert "2 ranks" in numbers["start_failures"]["why"]


def test_two_ranks_answer_through_the_gateway(divided: Slipway, keys: list[ServingKey]) -> None:
    (context,) = (key.serve["context"] for key in keys if key.name == "context")
    with serving(divided, "demo-awq") as served:
        assert served.model()["max_model_len"] == context
        assert served.complete('if __name__ == "__main', max_tokens=4).startswith('__":')
