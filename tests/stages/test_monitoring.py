"""A bundle's rules under promtool, and under a real Prometheus that scrapes a real vLLM and the gateway before it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bundle_evidence
import docker
import httpx
import pytest
import yaml

import gateways
from containers.engine.engine import install_packages
from containers.gateway.config import Backend, ModelRoute, ReplicaRoute, Routes
from containers.image import profile
from containers.image.build import serving_arguments
from containers.image.model_loader import with_list
from containers.image.runtime import build_runtime
from homes import DEMO, FREE_PORT
from pipeline.planner.facts import read_facts
from pipeline.settings import Settings

NAME = "demo-awq"


@pytest.fixture(scope="module", autouse=True)
def prometheus() -> None:
    """Debian's Prometheus and promtool."""
    if shutil.which("promtool") is None or shutil.which("prometheus") is None:
        install_packages(["prometheus"], print)


def promtool(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["promtool", *words]
    return subprocess.run(command, cwd=folder / "monitoring", capture_output=True, text=True, check=False)


# promtool


@pytest.mark.parametrize("given", [bundle_evidence.evidence, bundle_evidence.on_gpu], ids=["cpu", "gpu"])
def test_every_alert_fires_on_its_series_and_none_on_a_healthy_day(given: Callable[[], Any], tmp_path: Path) -> None:
    bundle_evidence.written(given(), tmp_path / "b")
    checked = promtool(tmp_path / "b", "check", "rules", "rules.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = promtool(tmp_path / "b", "test", "rules", "rules_test.yaml")
    assert tested.returncode == 0, tested.stdout + tested.stderr


def alerts(folder: Path) -> list[str]:
    rules = yaml.safe_load((folder / "monitoring" / "rules.yaml").read_text())["groups"][1]["rules"]
    return [rule["alert"] for rule in rules]


def test_the_tests_notice_an_alert_that_is_deaf_and_one_that_always_cries(tmp_path: Path) -> None:
    bundle_evidence.written(bundle_evidence.evidence(), tmp_path / "b")
    path = tmp_path / "b" / "monitoring" / "rules.yaml"
    whole = path.read_text()
    for alert in alerts(tmp_path / "b"):
        for broken in ("vector(0) > 1", "vector(1)"):
            document = yaml.safe_load(whole)
            rule = next(each for each in document["groups"][1]["rules"] if each["alert"] == alert)
            rule["expr"] = broken
            path.write_text(yaml.safe_dump(document))
            assert promtool(tmp_path / "b", "test", "rules", "rules_test.yaml").returncode != 0, f"{alert}: {broken}"


# Prometheus


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def vllm(engine: docker.DockerClient, machine: Settings) -> Iterator[str]:
    """The demo model in its runtime, as it is served."""
    runtime = profile.load("vllm-cpu")
    image = build_runtime(engine, runtime, machine.home, print).image_id
    held = contextlib.ExitStack()
    mounts = held.enter_context(with_list({DEMO / "model": "/model"}, machine.home, {}))
    container = engine.containers.run(
        image,
        command=list(serving_arguments(runtime, DEMO / "model", "demo")),
        entrypoint=list(runtime.entrypoint),
        environment=runtime.full_environment,
        volumes={str(path): {"bind": place, "mode": "ro"} for path, place in mounts.items()},
        ports={"8000/tcp": FREE_PORT},
        tmpfs={"/tmp": "rw,exec,mode=1777"},  # noqa: S108 - inside the container
        shm_size="1g",
        mem_limit="4g",
        detach=True,
    )
    try:
        container.reload()
        url = f"http://127.0.0.1:{container.attrs['NetworkSettings']['Ports']['8000/tcp'][0]['HostPort']}"
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            container.reload()
            assert container.status == "running", container.logs(tail=30).decode()
            time.sleep(0.5)
        log = container.logs().decode()
        # What the planner says of this model, as the engine itself logs it: a gibibyte of cache.
        cache = re.search(r"KV cache size: ([\d,]+) tokens", log)
        assert cache is not None
        facts = read_facts(json.loads((DEMO / "model" / "config.json").read_text()))
        assert facts.kv_bytes_per_token() * int(cache[1].replace(",", "")) == 2**30
        yield url
    finally:
        container.remove(force=True)
        held.close()


@contextlib.contextmanager
def scraping(folder: Path, bundle: Path, targets: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """A Prometheus with the bundle's rules; gives what asks its API."""
    labels = {"namespace": "slipway", "pod": f"{NAME}-engine-a"}
    jobs = [
        {"job_name": job, "static_configs": [{"targets": [address.removeprefix("http://")],
                                              "labels": labels if job.endswith("engine") else {}}]}
        for job, address in targets.items()
    ]  # fmt: skip
    document = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(bundle / "monitoring" / "rules.yaml")],
        "scrape_configs": jobs,
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(document))
    port = free_port()
    command = [
        "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=10)
    try:

        def ask(path: str, **parameters: str) -> Any:  # noqa: ANN401 - JSON
            answer = client.get(f"/api/v1/{path}", params=parameters).json()
            assert answer["status"] == "success", answer
            return answer["data"]

        for _ in range(200):
            with contextlib.suppress(httpx.TransportError):
                if client.get("/-/ready").status_code == 200:
                    break
            time.sleep(0.1)
        yield ask
    finally:
        client.close()
        process.terminate()
        process.wait()


def test_prometheus_reads_vllm_and_the_gateway_and_judges_by_the_rules(
    vllm: str, settings: Settings, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    bundle_evidence.written(bundle_evidence.evidence(), bundle)
    given = json.loads((bundle / "base" / "routes.json").read_text())
    replica = ReplicaRoute(name="a", url=vllm)
    route = ModelRoute.model_validate({**given["models"]["demo"], "tokenizer": str(DEMO / "model")})
    backends = (Backend(release=route.backends[0].release, replicas=(replica,)),)
    routed = Routes(models={"demo": route.model_copy(update={"backends": backends})})
    with gateways.gateway(settings, tmp_path / "gateway", routed) as running:
        targets = {f"{NAME}-engine": vllm, f"{NAME}-gateway": running.process.admin_url}
        with scraping(tmp_path, bundle, targets) as ask:
            ended = time.monotonic() + 25
            while time.monotonic() < ended:
                assert running.ask("def f(", model="demo").status_code == 200
                time.sleep(0.5)
            up = {each["metric"]["job"]: each["value"][1] for each in ask("query", query="up")["result"]}
            assert up == {f"{NAME}-engine": "1", f"{NAME}-gateway": "1"}
            rules = [rule for group in ask("rules")["groups"] for rule in group["rules"]]
            assert {(rule["name"], rule["health"]) for rule in rules if rule["health"] != "ok"} == set()
            assert len(rules) == 4 + 12
            firing = [each["labels"]["alertname"] for each in ask("alerts")["alerts"] if each["state"] == "firing"]
            assert firing == []
            for signal in ("requests_waiting", "requests_outstanding", "kv_cache_used"):
                (found,) = ask("query", query=f"slipway:{signal}")["result"]
                assert found["metric"]["pod"] == f"{NAME}-engine-a"
            panels = json.loads((bundle / "monitoring" / "dashboard.json").read_text())["panels"]
            empty = {
                panel["title"]
                for panel in panels
                for target in panel["targets"]
                if not ask("query", query=target["expr"])["result"]
            }
    # No GPU is here, no registry is scraped, and no request was streamed.
    assert empty <= {"GPU memory in use (constant)", "Marked by a rescan", "First token"}


def test_what_prometheus_reads_of_the_pipeline_is_its_format(tmp_path: Path) -> None:
    from pipeline.orchestration import metrics  # noqa: PLC0415

    found = metrics.ReleaseMetrics(
        champions=[metrics.ChampionState(release=NAME, version="3", manifest_digest="sha256:ab", marked=True)],
        runs={"success": 3, "failure": 1},
        queue=2,
        verdicts=[metrics.LastVerdict(NAME, "drift", "fail")],
        stages=[metrics.StageDuration(NAME, "load", 31.5)],
        store_bytes={"source": 10**9},
    )
    text = metrics.exposition(found)
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    for line in (
        f'slipway_release_marked{{release="{NAME}"}} 1.0', 'slipway_release_runs{status="failure"} 1.0',
        "slipway_queued_runs 2.0", f'slipway_verdict_info{{gate="drift",release="{NAME}",status="fail"}} 1.0',
        f'slipway_stage_seconds{{release="{NAME}",stage="load"}} 31.5',
        'slipway_artifact_store_bytes{stage="source"} 1e+09',
    ):  # fmt: skip
        assert line in text.splitlines()
