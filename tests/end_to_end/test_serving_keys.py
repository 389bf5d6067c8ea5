"""Every key of `serve` in a release of its own: what it makes again, and where it is written (`make test-long`)."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from bundle_evidence import engine_container
from serving_keys import CHAT_TEMPLATE, NAMES, contains, few_tool_calls, read

from containers.image.build import SERVING
from containers.image.serving import DEFAULT
from evals.load.evidence import read_load_evidence
from homes import DEMO, Slipway, make_home
from pipeline.settings import Settings
from registry.manifest import EVIDENCE, REPORT

pytestmark = pytest.mark.long
KEYS = [key for key in map(read, NAMES) if key.runtime == "vllm-cpu"]


@dataclass(frozen=True)
class Keyed:
    """A home in which the demo was released as its file says, but with few questions and in one scheme."""

    slipway: Slipway
    file: Path

    def release(self, serve: dict[str, Any]) -> dict[str, Any]:
        """Release it with another section `serve`."""
        spec: dict[str, Any] = yaml.safe_load(
            DEMO.with_suffix(".yaml").read_text().replace("file:demo/", f"file:{DEMO}/")
        )
        tasks = {"cloze": {"items": 60, "max_drop": 0.3}, "perplexity": {"items": 40, "max_increase": 0.2}}
        for name, limits in tasks.items():
            spec["evals"]["tasks"][name] |= limits
        if "tool_calls" in serve:
            spec["evals"]["tasks"] |= few_tool_calls()
        spec["evals"] |= {"again": 0, "layers": False}
        spec["load"] |= {"memory": {"limit_bytes": "6GiB"}, "slo": {"p95_latency_ms": 60_000, "error_rate": 0.0}}
        spec |= {"model": "keyed", "schemes": {"gptq": spec["schemes"]["gptq"]}, "serve": serve}
        self.file.write_text(yaml.safe_dump(spec))
        done = self.slipway("release", self.file, "--json")
        assert done.stdout, done.stderr
        (released,) = json.loads(done.stdout)["releases"]
        assert released["outcome"] == "promoted", (released, done.stderr)
        return dict(released)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, machine: Settings) -> Keyed:
    folder = tmp_path_factory.mktemp("keyed")
    shutil.copy(CHAT_TEMPLATE, folder)
    shutil.copytree(DEMO / "adapters", folder / "demo" / "adapters")
    first = Keyed(Slipway(make_home(folder / "home", machine)), folder / "keyed.yaml")
    first.release({})
    return first


@pytest.mark.parametrize("name", [key.name for key in KEYS])
def test_a_key_makes_again_what_depends_on_it_and_reaches_what_is_pulled(
    keyed: Keyed, machine: Settings, tmp_path: Path, name: str
) -> None:
    if name == "kv_cache" and machine.cpu.instruction_set == "avx2":
        pytest.skip("needs AVX-512: vLLM has no FP8 KV cache without")
    key = read(name)
    before: dict[str, Any] = {}
    if name == "tool_calls":
        before["chat_template"] = f"file:{CHAT_TEMPLATE.name}"  # calls are asked for by chat
        keyed.release(before)
    released = keyed.release(before | key.serve)
    assert {stage["name"] for stage in released["stages"] if not stage["cached"]} == key.again
    folder = tmp_path / "pulled"
    assert keyed.slipway("pull", "keyed-gptq", folder).returncode == 0
    (served,) = json.loads((folder / "release" / "manifest.json").read_text())["serving"]
    assert contains(served["command"], key.command)
    label = json.loads(json.loads((folder / EVIDENCE / "image.json").read_text())["labels"][SERVING])
    assert label[name] != DEFAULT.model_dump(mode="json")[name]
    assert " ".join(key.command) in (folder / REPORT).read_text()
    server = read_load_evidence(folder / EVIDENCE).server
    assert server.requested is not None
    assert contains(server.requested.arguments, key.command)
    assert server.not_applied == []
    done = keyed.slipway("bundle", "keyed-gptq", "--out", tmp_path / "bundle")
    assert done.returncode == 0, done.stderr
    assert engine_container(tmp_path / "bundle")["args"] == served["command"]
