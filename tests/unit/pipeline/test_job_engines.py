"""The engines of jobs as their interfaces answer: whose certificate is trusted, and who ended a job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recording_server import Answer, Asked, own_certificate, recording

from pipeline.errors import WorkerFailed
from pipeline.workers.launchers.jobs import Jobs
from pipeline.workers.launchers.kubernetes import KubernetesCluster
from pipeline.workers.launchers.placement import Kubernetes, Ray
from pipeline.workers.launchers.ray import RayCluster
from pipeline.workers.launchers.remote_job import announced
from pipeline.workers.launchers.task import MESSAGES, Task
from registry.manifest import FileRecord

STORE = "s3://artifacts/slipway"
ERRAND, OUTCOME = FileRecord(sha256="a" * 64, size=3), FileRecord(sha256="b" * 64, size=4)


def cluster(address: str, certificate: Path) -> KubernetesCluster:
    image = f"registry.example/worker@sha256:{'a' * 64}"
    placed = Kubernetes(
        launcher="kubernetes", address=address, image=image, store=STORE, token=None, certificate=certificate
    )
    return KubernetesCluster(placed)


def test_an_authority_that_is_not_the_clusters_is_named(tmp_path: Path) -> None:
    server, other = (own_certificate(tmp_path / name) for name in ("server.pem", "other.pem"))
    with recording(certificate=server) as api:
        assert cluster(api.address, server).running("a-job") is None
        with pytest.raises(WorkerFailed, match=r"is not trusted .*`certificate` \(.*other\.pem\)"):
            cluster(api.address, other).running("a-job")


def test_an_authority_that_is_not_rays_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, other = (own_certificate(tmp_path / name) for name in ("server.pem", "other.pem"))
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(other))
    with recording(certificate=server) as api:
        asking = RayCluster(Ray(launcher="ray", address=api.address, store=STORE))
        with pytest.raises(WorkerFailed, match=r"is not trusted .*`SSL_CERT_FILE`"):
            asking.running("a-job")


@pytest.mark.parametrize("body", [b"<html>log in</html>", b"[]", b"null"])
def test_what_is_no_engines_answer_is_one_line_and_no_end_of_a_job(body: bytes, tmp_path: Path) -> None:
    certificate = own_certificate(tmp_path / "server.pem")
    with recording(certificate=certificate) as api, recording() as dashboard:
        api.answer = dashboard.answer = lambda _: Answer(body=body)
        for engine in (
            cluster(api.address, certificate), RayCluster(Ray(launcher="ray", address=dashboard.address, store=STORE))
        ):  # fmt: skip
            for asked in (engine.running, engine.why):
                with pytest.raises(WorkerFailed, match="with a JSON object"):
                    asked("a-job")


@pytest.mark.parametrize("body", [b"{}", b'{"status": null}', b'{"status": {"conditions": [{}]}}'])
def test_a_job_of_which_the_cluster_says_nothing_yet_runs(body: bytes, tmp_path: Path) -> None:
    certificate = own_certificate(tmp_path / "server.pem")
    with recording(certificate=certificate) as api:
        api.answer = lambda _: Answer(body=body)
        asked = cluster(api.address, certificate)
        assert asked.running("a-job") is True
        assert asked.states("a-job") == ()


class ScriptedRay:
    """Ray's interface with jobs that go through ``states``, one a look; the last one stays."""

    def __init__(self, states: dict[str, list[str]]) -> None:
        self.states = states
        self.submitted: list[str] = []

    def __call__(self, asked: Asked) -> Answer:
        if asked.method == "POST":
            self.submitted.append(asked.target)
            return Answer(body=b"{}")
        _, _, _, job, *log = asked.target.split("/")
        if job not in self.states:
            return Answer(200 if "packages" in asked.target else 404, body=b"{}")
        if log:
            return Answer(
                body=json.dumps({"logs": announced(OUTCOME) if "SUCCEEDED" in self.states[job] else ""}).encode()
            )
        status = self.states[job][0]
        if len(self.states[job]) > 1:
            self.states[job].pop(0)
        return Answer(body=json.dumps({"status": status, "message": "stopped by a user"}).encode())


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setattr(RayCluster, "poll_seconds", 0.01)
    (tmp_path / MESSAGES).touch()
    return Task("aiperf", Path("s.py"), {}, tmp_path, {})


def test_who_joined_a_job_of_ray_that_was_stopped_goes_on_with_another(task: Task) -> None:
    told: list[str] = []
    script = ScriptedRay({"slipway-x-1": ["RUNNING", "RUNNING", "STOPPED"], "slipway-x-2": ["RUNNING", "SUCCEEDED"]})
    with recording() as api:
        api.answer = script
        tried = Jobs(RayCluster(Ray(launcher="ray", address=api.address, store=STORE)), STORE, told.append)
        assert tried._tried("slipway-x", ERRAND, task) is None
        assert tried._tried("slipway-x", ERRAND, task) == OUTCOME
    assert script.submitted == []
    assert any("was stopped by the run that started it" in line for line in told)


def test_a_job_of_ray_that_fails_by_itself_is_not_tried_again(task: Task) -> None:
    with recording() as api:
        api.answer = ScriptedRay({"slipway-x-1": ["RUNNING", "FAILED"]})
        tried = Jobs(RayCluster(Ray(launcher="ray", address=api.address, store=STORE)), STORE, print)
        with pytest.raises(WorkerFailed, match="ended without an outcome"):
            tried._tried("slipway-x", ERRAND, task)
