"""A serving variant of the demo, whole: a smaller context with speculation, measured, listed, compared and served.

The home has the first release's artifacts, so that only the variant is measured: three starts of vLLM.
"""

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

from evals.load.evidence import read_load_evidence
from homes import DEMO, SLIPWAY, Slipway, make_home
from pipeline.settings import Settings

pytestmark = pytest.mark.long

# The longest prompt of the demo's suite takes fewer tokens, so FP16's answers are those of the first release.
CONTEXT = 512
SERVE = {"variants": {"short": {"context": CONTEXT, "speculative": {"method": "ngram", "tokens": 4}}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model file with a variant, in one scheme."""
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


def test_the_variant_alone_is_measured_and_listed(released: dict[str, Any], pulled: Path) -> None:
    made = {stage["name"] for stage in released["stages"] if not stage["cached"]}
    assert made <= {"variants", "release", "scan"}, released["stages"]
    assert released["variants"] == {"short": "variant `short` passed"}
    manifest = json.loads((pulled / "release/manifest.json").read_bytes())
    assert [(each["variant"], each["context"]) for each in manifest["serving"]] == [(None, 1024), ("short", CONTEXT)]


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


def test_the_listed_variant_is_served_and_another_is_refused(released: dict[str, Any], slipway: Slipway) -> None:
    assert released["variants"]
    key = slipway("keys", "add", "--owner", "test").stdout.strip()
    words = ["--port", "0", "--admin-port", "0", "--json", "--variant", "short"]
    with (slipway.home / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [SLIPWAY, "serve", "demo-gptq", *words], env=dict(slipway.variables), stdout=subprocess.PIPE, stderr=log,
            text=True,
        )  # fmt: skip
    assert process.stdout is not None
    try:
        text = ""
        while not text.endswith("\n}\n"):
            line = process.stdout.readline()
            assert line, (slipway.home / "serve.log").read_text()
            text += line
        url, headers = json.loads(text)["url"], {"Authorization": f"Bearer {key}"}
        (served,) = httpx.get(f"{url}/v1/models", headers=headers, timeout=60).json()["data"]
        assert served["max_model_len"] == CONTEXT
        body = {"model": "demo-gptq", "prompt": "def ", "max_tokens": 8}
        answer = httpx.post(f"{url}/v1/completions", headers=headers, json=body, timeout=60)
        assert answer.json()["choices"][0]["text"]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
        process.stdout.close()
    done = slipway("serve", "demo-gptq", "--variant", "long")
    assert done.returncode == 1
    assert "demo-gptq does not list the variant `long`" in done.stderr
