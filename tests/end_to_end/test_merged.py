"""A LoRA adapter of a hub that becomes part of the demo's weights, through a whole release.

Both parents are recorded, and a branch that moves away from its lock changes nothing but is said.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from homes import DEMO, Slipway, make_home
from pipeline.settings import Settings
from registry.digests import digest_file
from registry.manifest import EVIDENCE, MANIFEST, PROVENANCE, Manifest
from unit.pipeline.hub_server import COMMIT, REPOSITORY, StandInHub, serving

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
ADAPTER = {path.name: path.read_bytes() for path in (DEMO / "adapters" / "manual").iterdir()}
URI = f"hf://{REPOSITORY}"


def model_file(folder: Path) -> Path:
    """The demo's file with an adapter merged into its source; one scheme, few questions, time on shared cores."""
    document: dict[str, Any] = yaml.safe_load(
        DEMO.with_suffix(".yaml").read_text().replace("file:demo/", f"file:{DEMO}/")
    )
    document |= {"model": "manual", "schemes": {"gptq": document["schemes"]["gptq"]}}
    document["source"]["adapter"] = {"uri": URI, "revision": "main"}
    document["evals"] |= {"engine": "hf", "again": 0, "layers": False}
    document["evals"]["tasks"]["cloze"] |= {"items": 200, "tier": "supporting"}
    document["evals"]["tasks"]["perplexity"] |= {"items": 200}
    document["load"]["slo"] = {"p95_latency_ms": 60_000, "error_rate": 0.0}
    # The canary is of the demo's own text; the first release takes one of the merged model's.
    del document["load"]["canary"]
    path = folder / "manual.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    with serving(dict(ADAPTER)) as hub:
        yield hub


def test_a_merged_model_is_released_and_its_records_name_both_parents(
    machine: Settings, hub: StandInHub, tmp_path: Path
) -> None:
    slipway = Slipway({**make_home(tmp_path / "home", machine), "HF_ENDPOINT": hub.endpoint})
    path = model_file(tmp_path)
    done = slipway("release", path, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["releases"][0]["outcome"] == "promoted"
    for lock in ("manual.lock.json", "manual.merged_adapter.lock.json"):
        assert (tmp_path / lock).exists()

    pulled = tmp_path / "pulled"
    for words in (("pull", "manual-gptq", pulled), ("verify", pulled)):
        checked = slipway(*words)
        assert checked.returncode == 0, checked.stderr
    source = Manifest.parse((pulled / MANIFEST).read_bytes()).source
    assert source.files["model.safetensors"].sha256 == digest_file(DEMO / "model" / "model.safetensors")
    assert source.adapter is not None
    assert (source.adapter.uri, source.adapter.revision) == (URI, COMMIT)
    assert {name: record.sha256 for name, record in source.adapter.files.items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in ADAPTER.items()
    }
    payload = json.loads((pulled / PROVENANCE).read_text())["dsseEnvelope"]["payload"]
    definition = json.loads(base64.b64decode(payload))["predicate"]["buildDefinition"]
    dependencies = {each["name"]: each for each in definition["resolvedDependencies"]}
    assert [dependencies[name]["uri"] for name in ("source", "merged adapter")] == ["file:model", URI]
    bill = json.loads((pulled / EVIDENCE / "mlbom.cdx.json").read_text())
    ancestors = bill["metadata"]["component"]["pedigree"]["ancestors"]
    assert [each["name"] for each in ancestors] == ["file:model", URI]

    hub.commit, hub.seen = "f" * 40, []
    again = slipway("release", path, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["releases"][0]["outcome"] == "up-to-date"
    (line,) = [line for line in again.stderr.splitlines() if "source.adapter" in line]
    assert f"{URI} is at ffffffffffff now; manual.merged_adapter.lock.json holds it at {COMMIT[:12]}" in line
    assert not any("/resolve/" in path for _, path, _, _ in hub.seen)
