"""The whole release, by the command line, with every part real; then everything that can go wrong with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import httpx
import hub_cards
import pytest
import yaml
from docker.models.containers import Container

from containers.engine.owner import home_digest
from homes import DEMO, FREE_PORT, Slipway, forget
from unit.pipeline import hub_server


@pytest.fixture
def variant(tmp_path: Path) -> Callable[..., Path]:
    """Writes the demo's file with changes, its data still the demo's."""

    def write(change: Callable[[dict[str, Any]], None], source: Path = DEMO / "model") -> Path:
        spec = yaml.safe_load(DEMO.with_suffix(".yaml").read_text().replace("file:demo/", f"file:{DEMO}/"))
        spec["source"]["uri"] = f"file:{source}"
        change(spec)
        path = tmp_path / "demo.yaml"
        path.write_text(yaml.safe_dump(spec))
        return path

    return write


@pytest.fixture
def unchanged(slipway: Slipway, released: dict[str, Any], engine: docker.DockerClient) -> Iterator[None]:
    """After the test no alias has moved, no container is left, and the next good run succeeds."""
    before = slipway.aliases()
    yield
    assert slipway.aliases() == before
    assert containers(engine, slipway) == []
    again = slipway("release", "demo", "--json")
    assert again.returncode == 0, again.stderr
    assert {entry["outcome"] for entry in json.loads(again.stdout)["releases"]} == {"up-to-date"}


def containers(engine: docker.DockerClient, slipway: Slipway) -> list[str]:
    label = f"slipway.home={home_digest(slipway.home)}"
    return [str(found.name) for found in engine.containers.list(all=True, filters={"label": label})]


def test_the_demo_is_released_in_both_schemes(released: dict[str, Any]) -> None:
    assert [entry["scheme"] for entry in released["releases"]] == ["awq", "gptq"]
    for entry in released["releases"]:
        assert entry["outcome"] == "promoted"
        assert entry["aliases"] == ["candidate", "champion"]
        assert entry["manifest_digest"].startswith("sha256:")
        assert "sha256:" in entry["image"]
        assert [stage["name"] for stage in entry["stages"]] == [
            "source", "adapters", "quantized", "image", "baseline", "drift", "scan", "load", "variants", "release",
        ]  # fmt: skip
        assert {gate["name"]: gate["status"] for gate in entry["gates"]} == {
            "drift": "pass", "scan": "inconclusive", "load": "pass",
        }  # fmt: skip
        assert entry["measured"]["size_ratio"] < 0.6


def test_fp16_is_asked_once_for_both_schemes(slipway: Slipway, released: dict[str, Any]) -> None:
    baselines = [entry["stages"][4] for entry in released["releases"]]
    assert sorted(stage["cached"] for stage in baselines) == [False, True]


def test_a_second_release_does_nothing(slipway: Slipway, released: dict[str, Any]) -> None:
    again = json.loads(slipway("release", "demo", "--json").stdout)
    assert [entry["outcome"] for entry in again["releases"]] == ["up-to-date", "up-to-date"]
    assert all(stage["cached"] for entry in again["releases"] for stage in entry["stages"])
    for before, after in zip(released["releases"], again["releases"], strict=True):
        assert after["manifest_digest"] == before["manifest_digest"]
        assert after["version"] == before["version"]


def test_status_and_report_show_the_release(slipway: Slipway, released: dict[str, Any], tmp_path: Path) -> None:
    lines = json.loads(slipway("status", "demo", "--json").stdout)
    assert {line["name"]: line["aliases"] for line in lines} == {
        "demo-awq": ["candidate", "champion"],
        "demo-gptq": ["candidate", "champion"],
    }
    assert slipway("report", "demo-awq", "--out", tmp_path / "report.html").returncode == 0
    report = (tmp_path / "report.html").read_text()
    assert "<svg" in report
    assert "<h1>demo <span>awq</span></h1>" in report


def test_a_release_is_planned_priced_and_handed_to_a_cluster_from_its_own_measurements(
    slipway: Slipway, released: dict[str, Any], tmp_path: Path
) -> None:
    planned = json.loads(slipway("plan", "demo-awq", "--gpu", "L4", "--json").stdout)
    assert planned["kv_bytes_per_token"] == 2048
    # Predicted from weights, cache and runtime, measured in the sandbox.
    assert abs(planned["measured"]["expected"]["error"]) < 0.15
    assert slipway("report", "demo-awq", "--out", tmp_path / "report.html").returncode == 0
    assert "for a million output tokens" in (tmp_path / "report.html").read_text()
    done = slipway("bundle", "demo-awq", "--out", tmp_path / "bundle", "--json")
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)["numbers"]
    (load,) = [stage for stage in released["releases"][0]["stages"] if stage["name"] == "load"]
    assert 0 < numbers["start_seconds"]["value"] < load["seconds"]
    engine = (tmp_path / "bundle" / "base" / "engine.yaml").read_text()
    assert released["releases"][0]["manifest_digest"] in engine
    assert 'slipway_release_marked{release="demo-awq"} 0' in slipway("metrics").stdout


def test_what_is_pulled_verifies_and_serves(
    slipway: Slipway, released: dict[str, Any], engine: docker.DockerClient, tmp_path: Path
) -> None:
    folder = tmp_path / "pulled"
    assert slipway("pull", "demo-awq@champion", folder).returncode == 0
    assert slipway("verify", folder).returncode == 0
    trust = tmp_path / "trust"  # which the container's user can read
    trust.mkdir(mode=0o755)
    shutil.copy(slipway.home / "keys" / "release.pub", trust)
    (trust / "release.pub").chmod(0o644)
    image = released["releases"][0]["image"]
    container = engine.containers.run(
        image,
        command=["--model", "/model", "--served-model-name", "m", "--port", "8000", "--enforce-eager"],
        volumes={
            str(folder): {"bind": "/model", "mode": "ro"},
            str(trust): {"bind": "/etc/slipway-trust", "mode": "ro"},
        },
        ports={"8000/tcp": FREE_PORT},
        tmpfs={"/tmp": "exec"},  # noqa: S108 - inside the container
        read_only=True,
        shm_size="1g",
        detach=True,
    )
    try:
        container.reload()
        port = container.attrs["NetworkSettings"]["Ports"]["8000/tcp"][0]["HostPort"]
        answer = ask(f"http://127.0.0.1:{port}", container)
        assert answer.startswith('__":')
    finally:
        container.remove(force=True)


def ask(url: str, container: Container) -> str:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        container.reload()
        assert container.status in {"created", "running"}, container.logs().decode()[-2000:]
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(1)
    request = {"model": "m", "prompt": 'if __name__ == "__main', "max_tokens": 8, "temperature": 0}
    text: str = httpx.post(f"{url}/v1/completions", json=request, timeout=60).json()["choices"][0]["text"]
    return text


def test_a_hub_gets_it_with_a_valid_card_and_gives_it_back(
    slipway: Slipway, released: dict[str, Any], tmp_path: Path
) -> None:
    with hub_server.serving({".gitattributes": b""}) as hub:
        place, address = f"hf://{hub_server.REPOSITORY}", {"HF_ENDPOINT": hub.endpoint}
        for said in ("published to", "already: nothing was written"):
            done = slipway("publish", "demo-gptq", place, **address)
            assert (done.returncode, said in done.stdout) == (0, True), done.stderr
        assert hub_cards.problems(hub.files["README.md"].decode()) == []
        assert slipway("pull", place, tmp_path / "pulled", **address).returncode == 0
    assert slipway("verify", tmp_path / "pulled").returncode == 0


def test_verify_names_every_file_that_differs(slipway: Slipway, released: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "pulled"
    slipway("pull", "demo-gptq", folder)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in names:
        path = folder / name
        path.chmod(0o644)
        good = path.read_bytes()
        path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
        changed = slipway("verify", folder)
        assert changed.returncode == 1
        assert name in changed.stdout
        path.write_bytes(good)
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "added.txt").write_text("x")
    both = slipway("verify", folder, "--json")
    assert both.returncode == 1
    assert {problem["name"] for problem in json.loads(both.stdout)["problems"]} == {"config.json", "added.txt"}
    (tmp_path / "config.json").rename(folder / "config.json")
    (folder / "added.txt").unlink()
    assert slipway("verify", folder).returncode == 0


def test_two_bits_are_refused_by_the_drift_gate(
    slipway: Slipway, variant: Callable[..., Path], unchanged: None
) -> None:
    def two_bits(spec: dict[str, Any]) -> None:
        spec["schemes"] = {"gptq2": {"method": "gptq", "backend": "gptqmodel", "bits": 2, "group_size": 64}}
        spec["evals"]["engine"] = "hf"  # vLLM loads no two bits
        spec["evals"]["tasks"] = {"cloze": {"items": 120}, "perplexity": {"items": 120}}

    done = slipway("release", variant(two_bits), "--json")
    assert done.returncode == 3, done.stderr
    (entry,) = json.loads(done.stdout)["releases"]
    assert entry["outcome"] == "refused"
    assert [(gate["name"], gate["status"]) for gate in entry["gates"]] == [("drift", "fail")]
    assert "release" not in [stage["name"] for stage in entry["stages"]]


def test_a_limit_that_cannot_be_met_refuses(slipway: Slipway, variant: Callable[..., Path], unchanged: None) -> None:
    path = variant(lambda spec: spec["load"]["slo"].update(p95_latency_ms=1))
    done = slipway("release", path, "--scheme", "gptq", "--json")
    assert done.returncode == 3, done.stderr
    (entry,) = json.loads(done.stdout)["releases"]
    assert entry["gates"][-1]["name"] == "load"
    assert entry["gates"][-1]["status"] == "fail"
    # A limit is judged, not measured: the load of the good release is looked at again.
    assert all(stage["cached"] for stage in entry["stages"])


def test_a_flipped_byte_in_the_source_is_refused_by_name(
    slipway: Slipway, variant: Callable[..., Path], unchanged: None, tmp_path: Path
) -> None:
    source = tmp_path / "demo" / "model"
    shutil.copytree(DEMO / "model", source)
    path = variant(lambda spec: spec["source"].update(uri="file:demo/model"))
    shutil.copyfile(DEMO.with_suffix(".lock.json"), path.with_suffix(".lock.json"))
    weights = source / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(data)
    done = slipway("release", path, "--scheme", "gptq")
    assert done.returncode == 1
    assert "model.safetensors" in done.stderr


def test_a_pickle_is_refused_by_name(
    slipway: Slipway, variant: Callable[..., Path], unchanged: None, tmp_path: Path
) -> None:
    shutil.copytree(DEMO / "model", tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    done = slipway("release", variant(lambda _: None, tmp_path / "model"), "--scheme", "gptq")
    assert done.returncode == 1
    assert "pytorch_model.bin" in done.stderr


def test_an_unreachable_hub_is_said_to_be_unreachable(
    slipway: Slipway, variant: Callable[..., Path], unchanged: None
) -> None:
    path = variant(lambda spec: spec["source"].update(uri="hf://org/name", revision="main"))
    done = slipway("release", path, "--scheme", "gptq", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "127.0.0.1:9" in done.stderr


def test_a_misspelt_key_is_usage(slipway: Slipway, variant: Callable[..., Path], unchanged: None) -> None:
    done = slipway("release", variant(lambda spec: spec["schemes"]["awq"].update(group_sise=64)))
    assert done.returncode == 2
    assert "schemes.awq.group_sise" in done.stderr
    assert "did you mean `group_size`?" in done.stderr


def test_no_engine_is_a_failure_of_the_environment(
    slipway: Slipway, variant: Callable[..., Path], unchanged: None, tmp_path: Path
) -> None:
    done = slipway("release", "demo", "--scheme", "gptq", DOCKER_HOST=f"unix://{tmp_path}/none.sock")
    assert done.returncode == 1
    assert "none.sock" in done.stderr


@pytest.mark.parametrize("stage", ["source", "drift", "image", "scan", "release"])
def test_killed_in_any_stage_the_same_command_completes(
    slipway: Slipway, released: dict[str, Any], engine: docker.DockerClient, stage: str
) -> None:
    """What the stage made is dropped, the run is killed in it, and the next run makes it whole.

    Killed quantizers and load tests are test_survival's.
    """
    made = forget(slipway, stage)
    process = slipway.start("release", "demo", "--scheme", "gptq")
    wait_until_being_made(slipway, made, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = slipway("release", "demo", "--scheme", "gptq", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["releases"][0]["outcome"] in {"promoted", "up-to-date"}
    assert containers(engine, slipway) == []
    assert not list((slipway.home / "artifacts" / ".making").iterdir())


def wait_until_being_made(slipway: Slipway, made: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until the stage is half-way: its folder is being made."""
    deadline = time.monotonic() + 900
    while not list((slipway.home / "artifacts" / ".making").glob(f"{made}-*")):
        assert time.monotonic() < deadline
        assert process.poll() is None, "the run ended before the stage began"
        time.sleep(0.005)
