"""Workers as jobs of Kubernetes: what is asked is valid by its published schemas, and a stand-in of its API runs it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_api import NAMESPACE, TOKEN, Api, kubernetes_api
from real_server import AWS, BUCKET, s3_server
from worker_processes import wait_until_gone

from checkout import CHECKOUT
from pipeline.errors import SettingsError, UnansweredError, WorkerFailed
from pipeline.settings import Settings
from pipeline.workers.launchers import http, jobs, kubernetes
from pipeline.workers.launchers.configured import launcher
from pipeline.workers.launchers.kubernetes import KubernetesCluster
from pipeline.workers.launchers.placement import Kubernetes, placement
from pipeline.workers.launchers.task import Task
from pipeline.workers.runner import Workers
from registry.manifest import FileRecord
from registry.progress import Progress
from stages.test_ray import ENVIRONMENT, RUN, SLEEPS, wait_for, write

IMAGE = "registry.example/slipway-worker@sha256:" + "a" * 64


@dataclass(frozen=True)
class Elsewhere:
    """The cluster, and how to run workers on it."""

    api: Api
    variables: dict[str, str]
    file: Path

    def configure(self, **changes: object) -> None:
        placed = {
            "launcher": "kubernetes", "address": self.api.address, "namespace": NAMESPACE, "image": IMAGE,
            "store": f"s3://{BUCKET}/artifacts", "token": str(self.file.with_name("token")), "certificate": None,
        }  # fmt: skip
        self.file.write_text(yaml.safe_dump({**placed, **changes}))

    def run(self, script: Path, folder: Path, told: Progress = print, **request: object) -> dict[str, Any]:
        settings = Settings.read(self.variables)
        return Workers(settings, print, launcher=launcher(settings, told))(ENVIRONMENT, script, request, folder)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with s3_server(tmp_path_factory.mktemp("cloud")) as address:
        yield {**AWS, "AWS_ENDPOINT_URL": address}


@pytest.fixture
def elsewhere(
    tmp_path: Path, home: dict[str, str], s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Elsewhere]:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(kubernetes, "_POLL_SECONDS", 0.2)
    monkeypatch.setattr(jobs, "_PAUSE_SECONDS", 0.1)
    there = tmp_path / "there"
    there.mkdir()
    (there / "token").write_text(f"{TOKEN}\n")
    with kubernetes_api(there, {**s3, "SLIPWAY_HOME": home["SLIPWAY_HOME"], "HOME": str(there)}) as api:
        found = Elsewhere(api, {**home, **s3, "SLIPWAY_WORKERS": str(there / "workers.yaml")}, there / "workers.yaml")
        found.configure()
        yield found


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Path]:
    """A script beside the real ones, since a pod has the checkout's alone."""
    path = CHECKOUT / "pipeline" / "quantization" / "quantizers" / f"of_a_test_{tmp_path.name}.py"
    yield path
    path.unlink(missing_ok=True)


def test_a_worker_runs_on_the_nodes_and_with_the_gpus_that_are_configured(
    elsewhere: Elsewhere, script: Path, tmp_path: Path
) -> None:
    elsewhere.configure(
        gpus=2, node_selector={"nvidia.com/gpu.product": "NVIDIA-H200"}, secrets=["s3"], claim="environments",
        tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}], memory="64Gi",
        image_pull_secrets=["registry"], runtime_class="nvidia", priority_class="batch",
        ephemeral_storage="100Gi",
    )  # fmt: skip
    output = tmp_path / "output"
    output.mkdir()
    (tmp_path / "text.txt").write_text("text")
    body = 'Path(request["output"], "o.txt").write_text(Path(request["text"]).read_text().upper())\nreturn {"n": 1}'
    assert elsewhere.run(write(script, body), tmp_path, text=tmp_path / "text.txt", output=output) == {"n": 1}
    assert (output / "o.txt").read_text() == "TEXT"
    (job,) = elsewhere.api.jobs.values()
    pod = job["spec"]["template"]["spec"]
    assert job["spec"]["backoffLimit"] == 0
    assert pod["containers"][0]["image"] == IMAGE
    assert pod["containers"][0]["resources"]["limits"] == {
        "cpu": "4", "memory": "64Gi", "ephemeral-storage": "100Gi", "nvidia.com/gpu": "2",
    }  # fmt: skip
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H200"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert (pod["runtimeClassName"], pod["priorityClassName"]) == ("nvidia", "batch")
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert "testing" not in str(job)  # S3's key comes from the secret


def test_a_mistake_in_a_job_would_be_found(elsewhere: Elsewhere) -> None:
    where = placement(elsewhere.file)
    assert isinstance(where, Kubernetes)
    remote_job = FileRecord(sha256="a" * 64, size=3)
    manifest = KubernetesCluster(where).manifest("a-job", remote_job, Task("aiperf", Path("s.py"), {}, Path(), {}))
    kubernetes_validate.validate(manifest, "1.37", strict=True)
    manifest["spec"]["template"]["spec"]["nodeSelektor"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, "1.37", strict=True)


def test_a_worker_without_a_gpu_states_the_cpu_that_it_needs(elsewhere: Elsewhere) -> None:
    where = placement(elsewhere.file)
    assert isinstance(where, Kubernetes)
    remote_job = FileRecord(sha256="a" * 64, size=3)
    manifests = [
        KubernetesCluster(where.model_copy(update={"gpus": gpus})).manifest(
            "a-job", remote_job, Task("aiperf", Path("s.py"), {}, Path(), {})
        )
        for gpus in (0, 2)
    ]
    for each in manifests:
        kubernetes_validate.validate(each, "1.37", strict=True)
    on_cpu, on_gpu = (each["spec"]["template"]["spec"]["affinity"] for each in manifests)
    assert "feature.node.kubernetes.io/cpu-cpuid.AVX2" in str(on_cpu)
    assert on_gpu == {}
    (container,) = manifests[0]["spec"]["template"]["spec"]["containers"]
    assert set(container["resources"]["limits"]) == {"cpu", "memory"}
    assert not {"imagePullSecrets", "runtimeClassName", "priorityClassName"} & set(
        manifests[1]["spec"]["template"]["spec"]
    )


def test_a_token_that_is_not_there_is_named(elsewhere: Elsewhere, script: Path, tmp_path: Path) -> None:
    elsewhere.configure(token=str(tmp_path / "none"))
    with pytest.raises(SettingsError, match=r"`token`.*none"):
        elsewhere.run(write(script, "return {}"), tmp_path)


def test_who_may_not_is_told_so_without_the_token(elsewhere: Elsewhere, script: Path, tmp_path: Path) -> None:
    elsewhere.file.with_name("token").write_text("another-token")
    with pytest.raises(WorkerFailed, match=r"refused POST .*Unauthorized") as raised:
        elsewhere.run(write(script, "return {}"), tmp_path)
    assert "another" not in str(raised.value)


@pytest.mark.parametrize(
    ("body", "told"),
    [("raise WorkerError('no GPU here')", "no GPU here"), ("os.kill(os.getpid(), 9)", "was killed")],
)
def test_how_it_failed_is_told_as_if_it_had_run_here(
    elsewhere: Elsewhere, script: Path, tmp_path: Path, body: str, told: str
) -> None:
    with pytest.raises(WorkerFailed, match=told):
        elsewhere.run(write(script, body), tmp_path)


def test_a_pod_that_dies_is_told_with_the_clusters_own_words(
    elsewhere: Elsewhere, script: Path, tmp_path: Path
) -> None:
    write(script, SLEEPS.format(began=str(tmp_path / "began"), seconds=600))

    def evict() -> None:
        wait_for(tmp_path / "began")
        (process,) = elsewhere.api.processes.values()
        process.kill()

    evicting = threading.Thread(target=evict)
    evicting.start()
    with pytest.raises(WorkerFailed, match="BackoffLimitExceeded: Job has reached the limit"):
        elsewhere.run(script, tmp_path)
    evicting.join()
    wait_until_gone(script)


def start(elsewhere: Elsewhere, script: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", RUN, ENVIRONMENT, str(script), str(folder)]
    return subprocess.Popen(command, env=elsewhere.variables, cwd=CHECKOUT)


def test_an_interrupted_run_deletes_its_job(elsewhere: Elsewhere, script: Path, tmp_path: Path) -> None:
    process = start(elsewhere, write(script, SLEEPS.format(began=str(tmp_path / "began"), seconds=600)), tmp_path)
    wait_for(tmp_path / "began")
    process.send_signal(2)
    process.wait(120)
    wait_until_gone(script)
    assert elsewhere.api.processes == {}


def test_what_another_thread_stops_is_ended_and_its_job_deleted(
    elsewhere: Elsewhere, script: Path, tmp_path: Path
) -> None:
    write(script, SLEEPS.format(began=str(tmp_path / "began"), seconds=600))
    settings = Settings.read(elsewhere.variables)
    workers = Workers(settings, print, launcher=launcher(settings, print))
    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(workers, ENVIRONMENT, script, {}, tmp_path)
        wait_for(tmp_path / "began")
        workers.stop.set()
        with pytest.raises(WorkerFailed, match="was stopped"):
            running.result()
    wait_until_gone(script)
    assert elsewhere.api.processes == {}


def test_a_job_that_was_taken_and_whose_taking_nobody_heard_of_is_followed_by_the_next_run(
    elsewhere: Elsewhere, script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_PATIENCE_SECONDS", 0.0)
    write(script, SLEEPS.format(began=str(tmp_path / "began"), seconds=3))
    start_job = elsewhere.api.start

    def start_and_fall_silent(manifest: dict[str, Any]) -> None:
        start_job(manifest)
        elsewhere.api.lost = True

    monkeypatch.setattr(elsewhere.api, "start", start_and_fall_silent)
    with pytest.raises(UnansweredError):
        elsewhere.run(script, tmp_path)
    elsewhere.api.lost = False
    (tmp_path / "again").mkdir()
    assert elsewhere.run(script, tmp_path / "again") == {"slept": True}
    assert len(elsewhere.api.jobs) == 1


def test_a_server_that_restarts_and_forbids_for_a_while_ends_no_job(
    elsewhere: Elsewhere, script: Path, tmp_path: Path
) -> None:
    elsewhere.api.forbidden = 5
    told: list[str] = []
    write(script, SLEEPS.format(began=str(tmp_path / "began"), seconds=1))
    assert elsewhere.run(script, tmp_path, told.append) == {"slept": True}
    assert (elsewhere.api.forbidden, len(elsewhere.api.jobs)) == (0, 1)
    (line,) = {line for line in told if "forbidden" in line}
    assert "while the job continues" in line
    assert line.endswith('cannot get resource "jobs" in the namespace "models" (403)')


def test_a_server_that_forbids_for_good_leaves_the_job_alone(
    elsewhere: Elsewhere, script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_PATIENCE_SECONDS", 0.3)
    elsewhere.api.forbidden = 1_000_000
    write(script, SLEEPS.format(began=str(tmp_path / "began"), seconds=600))
    with pytest.raises(WorkerFailed, match="is forbidden"):
        elsewhere.run(script, tmp_path)
    assert len(elsewhere.api.processes) == 1


def test_why_a_job_does_not_begin_is_said_once_and_at_once(elsewhere: Elsewhere, script: Path, tmp_path: Path) -> None:
    unschedulable = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "Insufficient cpu",
    }
    waiting = {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}}}
    elsewhere.api.pod = {"phase": "Pending", "conditions": [unschedulable], "containerStatuses": [waiting]}
    elsewhere.api.events = [{"reason": "FailedCreate", "message": "exceeded quota: compute"}]
    told: list[str] = []
    write(script, SLEEPS.format(began=str(tmp_path / "began"), seconds=1))
    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(elsewhere.run, script, tmp_path, told.append)
        wait_for(tmp_path / "began")
        while not any("quota" in line for line in told):
            assert not running.done()
        elsewhere.api.pod = {}
        assert running.result() == {"slept": True}
    for said in ("Unschedulable: Insufficient cpu", "ImagePullBackOff: Back-off", "FailedCreate: exceeded quota"):
        assert sum(said in line for line in told) == 1, told


def test_an_eviction_is_told_although_the_log_is_gone(
    elsewhere: Elsewhere, script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_LAST_LOG_SECONDS", 0.2)
    write(script, SLEEPS.format(began=str(tmp_path / "began"), seconds=600))

    def evict() -> None:
        wait_for(tmp_path / "began")
        elsewhere.api.no_log = True
        elsewhere.api.pod = {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."}
        (process,) = elsewhere.api.processes.values()
        process.kill()

    with ThreadPoolExecutor(1) as beside:
        evicting = beside.submit(evict)
        with pytest.raises(WorkerFailed, match=r"Evicted: The node was low on resource: memory\.") as raised:
            elsewhere.run(script, tmp_path)
        evicting.result()
    assert "its log can't be read" in str(raised.value)


def test_a_drained_pod_is_replaced_and_its_work_done_again(elsewhere: Elsewhere, script: Path, tmp_path: Path) -> None:
    began = str(tmp_path / "began")
    again = f"if Path({began!r}).exists():\n    return {{'again': True}}\n"
    write(script, again + SLEEPS.format(began=began, seconds=600))
    told: list[str] = []

    def drain() -> None:
        wait_for(tmp_path / "began")
        disrupted = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI",
                     "message": "Eviction API: evicting"}  # fmt: skip
        elsewhere.api.pod = {"conditions": [disrupted]}
        while not any("evicting" in line for line in told):
            pass
        elsewhere.api.pod = {}
        elsewhere.api.disrupt(*elsewhere.api.processes)

    with ThreadPoolExecutor(1) as beside:
        draining = beside.submit(drain)
        assert elsewhere.run(script, tmp_path, told.append) == {"again": True}
        draining.result()
    assert list(elsewhere.api.attempts.values()) == [2]
    assert any("the cluster ended it and started it again" in line for line in told)


def test_a_job_with_a_queue_waits_for_it(elsewhere: Elsewhere, script: Path, tmp_path: Path) -> None:
    elsewhere.configure(
        queue="nightly", labels={"team": "models", "app.kubernetes.io/name": "x"},
        annotations={"karpenter.sh/do-not-disrupt": "true"},
    )  # fmt: skip
    assert elsewhere.run(write(script, "return {'n': 1}"), tmp_path) == {"n": 1}
    (job,) = elsewhere.api.jobs.values()
    assert job["spec"]["suspend"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "nightly"
    pod = job["spec"]["template"]["metadata"]
    for described in (job["metadata"], pod):
        assert described["labels"]["team"] == "models"
        assert described["labels"]["app.kubernetes.io/name"] == "slipway-worker"
        assert described["annotations"] == {"karpenter.sh/do-not-disrupt": "true"}
    assert "kueue.x-k8s.io/queue-name" not in pod["labels"]


def test_a_label_that_kubernetes_would_refuse_is_named_at_once(elsewhere: Elsewhere) -> None:
    elsewhere.configure(labels={"team": "a team"}, queue="Nightly")
    with pytest.raises(SettingsError) as raised:
        placement(elsewhere.file)
    assert "labels.team" in str(raised.value)
    assert "queue" in str(raised.value)


@pytest.mark.parametrize("version", ["1.29", "1.31", "1.33", "1.35", "1.37"])
def test_a_job_with_every_key_is_valid_in_every_version(elsewhere: Elsewhere, version: str) -> None:
    elsewhere.configure(
        queue="nightly", labels={"team": "models"}, annotations={"a/b": "c"}, gpus=1, secrets=["s3"],
        image_pull_secrets=["registry"], runtime_class="nvidia", priority_class="batch", claim="environments",
    )  # fmt: skip
    where = placement(elsewhere.file)
    assert isinstance(where, Kubernetes)
    task = Task("aiperf", Path("s.py"), {}, Path(), {})
    manifest = KubernetesCluster(where).manifest("a-job", FileRecord(sha256="a" * 64, size=3), task)
    kubernetes_validate.validate(manifest, version, strict=True)


def test_who_joins_a_job_and_is_stopped_leaves_it_to_who_started_it(
    elsewhere: Elsewhere, script: Path, tmp_path: Path
) -> None:
    write(script, SLEEPS.format(began=str(tmp_path / "began"), seconds=4))
    (tmp_path / "second").mkdir()
    settings, told = Settings.read(elsewhere.variables), list[str]()
    joining = Workers(settings, print, launcher=launcher(settings, told.append))
    with ThreadPoolExecutor(2) as beside:
        first = beside.submit(elsewhere.run, script, tmp_path)
        wait_for(tmp_path / "began")
        second = beside.submit(joining, ENVIRONMENT, script, {}, tmp_path / "second")
        while not any("following the running job" in line for line in told):
            assert not second.done()
        joining.stop.set()
        with pytest.raises(WorkerFailed, match="was stopped"):
            second.result()
        assert first.result() == {"slept": True}
    assert len(elsewhere.api.jobs) == 1


def test_who_joined_a_job_that_was_taken_away_starts_it_again(
    elsewhere: Elsewhere, script: Path, tmp_path: Path
) -> None:
    write(script, SLEEPS.format(began=str(tmp_path / "began"), seconds=2))
    (tmp_path / "second").mkdir()
    settings, told = Settings.read(elsewhere.variables), list[str]()
    starting = Workers(settings, print, launcher=launcher(settings, print))
    with ThreadPoolExecutor(2) as beside:
        first = beside.submit(starting, ENVIRONMENT, script, {}, tmp_path)
        wait_for(tmp_path / "began")
        second = beside.submit(elsewhere.run, script, tmp_path / "second", told.append)
        while not any("following the running job" in line for line in told):
            assert not second.done()
        starting.stop.set()
        with pytest.raises(WorkerFailed, match="was stopped"):
            first.result()
        assert second.result() == {"slept": True}
    assert any("starting it again" in line for line in told)


def test_a_job_costs_few_requests_over_one_connection(elsewhere: Elsewhere, script: Path, tmp_path: Path) -> None:
    write(script, SLEEPS.format(began=str(tmp_path / "began"), seconds=2))
    assert elsewhere.run(script, tmp_path) == {"slept": True}
    looks = sum(path.endswith("/log") for path in elsewhere.api.asked)
    assert len(elsewhere.api.asked) <= 3 * looks + 4
    assert len(elsewhere.api.connections) == 1


def test_a_cluster_that_is_busy_is_asked_again_when_it_says(elsewhere: Elsewhere, script: Path, tmp_path: Path) -> None:
    elsewhere.api.busy = 2
    assert elsewhere.run(write(script, "return {'n': 1}"), tmp_path) == {"n": 1}
    assert len(elsewhere.api.jobs) == 1


def test_after_a_killed_run_the_next_one_follows_the_same_job(
    elsewhere: Elsewhere, script: Path, tmp_path: Path
) -> None:
    write(script, SLEEPS.format(began=str(tmp_path / "began"), seconds=4))
    process = start(elsewhere, script, tmp_path)
    wait_for(tmp_path / "began")
    process.kill()
    process.wait()
    (tmp_path / "again").mkdir()
    assert elsewhere.run(script, tmp_path / "again") == {"slept": True}
    assert len(elsewhere.api.jobs) == 1
