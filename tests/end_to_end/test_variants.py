"""Serving variants of the demo, whole: one is listed and served, one has a cache of 8 bits, one fails the load gate.

The home has the first release's artifacts, so that only the variants are measured: nine starts of vLLM.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from serve_command import serving

from evals.drift.pairs import read_drift
from evals.load.evidence import read_load_evidence
from homes import DEMO, Slipway, make_home
from pipeline.settings import Settings

pytestmark = pytest.mark.long

# The longest prompt of the demo's suite takes fewer tokens, so FP16's answers are those of the first release.
CONTEXT = 512
SERVE = {
    "variants": {
        "short": {"context": CONTEXT, "speculative": {"method": "ngram", "tokens": 4}},
        "small": {"kv_cache": "fp8"},
        # Each rank has a KV cache of its own: 4.0 GB, of a limit of 4 GiB of which a fifth must stay free.
        "divided": {"tensor_parallel": 2},
    }
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model file with both variants, in one scheme."""
    text = DEMO.with_suffix(".yaml").read_text().replace("file:demo/", f"file:{DEMO}/")
    document = yaml.safe_load(text)
    document |= {"schemes": {"gptq": document["schemes"]["gptq"]}, "serve": SERVE}
    path = tmp_path_factory.mktemp("models") / "demo.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(scope="module")
def slipway(first_release: Path, tmp_path_factory: pytest.TempPathFactory, machine: Settings) -> Slipway:
    """The command in a home that has the first release's artifacts and key."""
    slipway = Slipway(make_home(tmp_path_factory.mktemp("variants") / "home", machine))
    for name in ("artifacts", "keys"):
        shutil.copytree(first_release / "home" / name, slipway.home / name, symlinks=True)
    return slipway


@pytest.fixture(scope="module")
def released(slipway: Slipway, model: Path) -> dict[str, Any]:
    done = slipway("release", model, "--json")
    assert done.returncode == 0, done.stderr
    (release,) = json.loads(done.stdout)["releases"]
    found: dict[str, Any] = release
    return found


@pytest.fixture(scope="module")
def pulled(released: dict[str, Any], slipway: Slipway) -> Path:
    """The release, as a deployment gets it."""
    assert released["outcome"] == "promoted"
    done = slipway("pull", "demo-gptq", slipway.home / "pulled")
    assert done.returncode == 0, done.stderr
    return slipway.home / "pulled"


def test_variants_alone_are_measured_and_those_that_passed_are_listed(
    released: dict[str, Any], pulled: Path, machine: Settings
) -> None:
    made = {stage["name"] for stage in released["stages"] if not stage["cached"]}
    assert made <= {"variants", "release", "scan"}, released["stages"]
    assert released["variants"]["short"] == "variant `short` passed"
    assert released["variants"]["divided"].startswith("variant `divided` is not listed: load fail")
    assert "peak_memory_bytes" in released["variants"]["divided"]
    manifest = json.loads((pulled / "release/manifest.json").read_bytes())
    small = [] if machine.cpu.instruction_set == "avx2" else [("small", 1024)]
    assert [(each["variant"], each["context"]) for each in manifest["serving"]] == [
        (None, 1024),
        ("short", CONTEXT),
        *small,
    ]


def test_a_cache_of_8_bits_is_measured_where_the_cpu_supports_it(
    released: dict[str, Any], pulled: Path, machine: Settings
) -> None:
    if machine.cpu.instruction_set == "avx2":
        assert released["variants"]["small"].startswith("variant `small` is not listed: drift inconclusive")
        return
    assert released["variants"]["small"] == "variant `small` passed"
    server = read_load_evidence(pulled / "release/evidence/variants/small").server
    assert server.report is not None
    assert server.report.kv_cache == "fp8"
    assert server.report.cache_bytes_per_token == 1024  # 2,048 at 16 bits
    assert server.not_applied == []
    drift = read_drift(pulled / "release/evidence/variants/small")
    assert drift.divergence is not None
    print(drift.divergence.mean)


def test_speculation_changed_no_answer_and_its_speed_is_reported(pulled: Path) -> None:
    load = read_load_evidence(pulled / "release/evidence/variants/short")
    found = load.speculation
    assert found is not None
    print(found)
    assert found.single.equal == found.single.answers == 24
    assert found.wrong is None
    assert found.acceptance_rate is not None
    assert found.acceptance_rate > 0.2
    assert found.single_tokens_per_second_without > 0
    assert load.server.report is not None
    assert load.server.report.speculative == "ngram"
    assert load.server.not_applied == []
    assert str(found).startswith("ngram, 4 tokens at once")


def test_the_listed_variant_is_served(released: dict[str, Any], slipway: Slipway) -> None:
    assert released["variants"]
    with serving(slipway, "demo-gptq", "--variant", "short") as served:
        assert served.model()["max_model_len"] == CONTEXT
        assert served.complete("def ", max_tokens=8)


@pytest.mark.parametrize("words", [("serve",), ("bundle", "--out", "bundle")])
def test_a_variant_whose_load_gate_failed_is_refused_by_name(
    released: dict[str, Any], slipway: Slipway, tmp_path: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert released["variants"]
    monkeypatch.chdir(tmp_path)
    command, *options = words
    done = slipway(command, "demo-gptq", "--variant", "divided", *options)
    assert done.returncode == 1
    assert (
        "demo-gptq does not list the variant `divided`, so it did not pass its gates (it lists `short`" in done.stderr
    )
    assert not (tmp_path / "bundle").exists()
