"""The first release's own AWQ, as if somebody else had published it, released as it is: with its original and without.

They find FP16's answers and the runtime in the first release's home.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from homes import DEMO, Slipway
from registry.manifest import Manifest

pytestmark = pytest.mark.long

SLO = {"p95_latency_ms": 60_000, "p95_ttft_ms": 60_000, "error_rate": 0.0}
REASON = "There is no original of it."


@pytest.fixture(scope="module")
def source(slipway: Slipway, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the first release, without what Slipway adds."""
    folder = tmp_path_factory.mktemp("published") / "demo-awq"
    done = slipway("pull", "demo-awq", folder)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(folder / "release")
    return folder


def released(slipway: Slipway, source: Path, name: str, more: Mapping[str, Any]) -> tuple[dict[str, Any], Manifest]:
    """Release it, pull it and verify it; return what was printed of it, and its manifest."""
    document = yaml.safe_load(DEMO.with_suffix(".yaml").read_text().replace("file:demo/", f"file:{DEMO}/"))
    document |= {"model": name, "source": {"uri": f"file:{source}"}, "schemes": {"awq": {"method": "as-is"}}}
    document["load"]["slo"] = SLO
    document["evals"] |= more.get("evals", {})
    document |= {key: value for key, value in more.items() if key != "evals"}
    path = source.parent / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document))
    done = slipway("release", path, "--json")
    assert done.returncode == 0, done.stderr
    (release,) = json.loads(done.stdout)["releases"]
    assert release["outcome"] == "promoted"
    pulled = source.parent / f"pulled-{name}"
    for words in (("pull", f"{name}-awq", pulled), ("verify", pulled)):
        done = slipway(*words)
        assert done.returncode == 0, done.stderr
    assert (pulled / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    return release, Manifest.parse((pulled / "release" / "manifest.json").read_bytes())


def test_a_published_checkpoint_is_compared_with_its_original_and_promoted(slipway: Slipway, source: Path) -> None:
    release, manifest = released(slipway, source, "taken", {"baseline": f"file:{DEMO}/model"})
    assert {gate["name"]: gate["status"] for gate in release["gates"]}["drift"] == "pass"
    assert {stage["name"] for stage in release["stages"] if stage["cached"]} >= {"source", "baseline"}
    assert (manifest.source.uri, manifest.baseline and manifest.baseline.uri) == ("file:demo-awq", "file:model")
    quantizer = manifest.quantizer
    assert (quantizer.backend, quantizer.version, quantizer.method) == ("none", "as published", "awq")
    assert quantizer.pins_digest is None
    again = slipway("release", source.parent / "taken.yaml", "--json")
    assert json.loads(again.stdout)["releases"][0]["outcome"] == "up-to-date"


def test_without_an_original_the_reason_is_signed(slipway: Slipway, source: Path) -> None:
    _, manifest = released(slipway, source, "alone", {"evals": {"accept_inconclusive": {"no-baseline": REASON}}})
    verdicts = {gate.verdict.gate: gate.verdict for gate in manifest.gates}
    assert (verdicts["drift"].status, verdicts["drift"].cause) == ("inconclusive", "no-baseline")
    assert verdicts["drift"].accepted_because == REASON
    assert verdicts["load"].status == "pass"
    assert manifest.baseline is None
