"""Workers as jobs of a real Ray cluster of two nodes, their files in real object storage."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray_cluster import Cluster, ray_cluster
from real_server import AWS, BUCKET, free_port, s3_server
from worker_processes import wait_until_gone

from checkout import CHECKOUT
from pipeline.errors import UnansweredError, WorkerFailed
from pipeline.settings import Settings
from pipeline.workers.launchers import http
from pipeline.workers.launchers.configured import launcher
from pipeline.workers.runner import Workers

ENVIRONMENT = "aiperf"  # the lightest


@dataclass(frozen=True)
class Elsewhere:
    """The cluster, and how to run workers on it."""

    cluster: Cluster
    settings: Settings
    variables: Mapping[str, str]

    def run(self, script: Path, folder: Path, **request: object) -> dict[str, object]:
        return Workers(self.settings, print, launcher=launcher(self.settings, print))(
            ENVIRONMENT, script, request, folder
        )

    def jobs(self) -> list[dict[str, str]]:
        found: list[dict[str, str]] = httpx.get(f"{self.cluster.address}/api/jobs/", trust_env=False).json()
        return [job for job in found if job["type"] == "SUBMISSION"]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, home: dict[str, str], machine: Settings) -> Iterator[Elsewhere]:
    folder = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patched, s3_server(folder) as address:
        s3 = {**AWS, "AWS_ENDPOINT_URL": address}
        for name, value in s3.items():
            patched.setenv(name, value)
        with ray_cluster(folder, machine, s3) as cluster:
            workers = cluster.workers(folder / "workers.yaml", f"s3://{BUCKET}/artifacts")
            variables = {**home, **s3, "SLIPWAY_WORKERS": str(workers)}
            yield Elsewhere(cluster, Settings.read(variables), variables)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A script beside the real ones, since a node has the checkout's alone."""
    path = CHECKOUT / "pipeline" / "quantization" / "quantizers" / f"of_a_test_{os.getpid()}.py"
    yield path
    path.unlink(missing_ok=True)


def write(path: Path, body: str) -> Path:
    lines = textwrap.indent(textwrap.dedent(body), "    ")
    path.write_text(
        "import os, sys, time\nfrom pathlib import Path\nfrom slipway_worker import WorkerError, main\n"
        f"def work(request, report):\n{lines}\nif __name__ == '__main__':\n    main(work)\n"
    )
    return path


def test_a_worker_runs_on_the_node_that_it_asks_for_and_sees_no_secret(
    elsewhere: Elsewhere, script: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (tmp_path / "text.txt").write_text("text")
    body = """
        Path(request["output"], "text.txt").write_text(Path(request["text"]).read_text().upper())
        return {"environment": dict(os.environ), "python": sys.executable}
    """
    folder = tmp_path / "folder"
    folder.mkdir()
    seen = elsewhere.run(write(script, body), folder, text=tmp_path / "text.txt", output=output)
    assert (output / "text.txt").read_text() == "TEXT"
    assert str(seen["python"]).startswith(str(elsewhere.cluster.homes[1]))
    assert not [name for name in seen["environment"] if "AWS" in name or "RAY" in name]  # type: ignore[attr-defined]
    assert not list((elsewhere.cluster.homes[1] / "scratch").iterdir())


def test_what_it_reports_comes_while_it_runs(elsewhere: Elsewhere, script: Path, tmp_path: Path) -> None:
    """As Dagster Pipes has it: the messages' file is what its reader follows."""
    from dagster_pipes import encode_param  # noqa: PLC0415 - as Dagster's side does

    context: dict[str, Any] = {"asset_keys": None, "code_version_by_asset_key": None, "provenance_by_asset_key": None,
               "partition_key": None, "partition_key_range": None, "partition_time_window": None,
               "run_id": "r", "job_name": None, "retry_number": 0, "extras": {}}  # fmt: skip
    variables = {
        "DAGSTER_PIPES_CONTEXT": encode_param({"data": context}),
        "DAGSTER_PIPES_MESSAGES": encode_param({"path": "x"}),
    }
    heard = tmp_path / "heard"
    waits = f"while not Path({str(heard)!r}).exists() and time.monotonic() < ends:\n    time.sleep(0.1)\n"
    body = f"report('layer 1 of 2')\nends = time.monotonic() + 300\n{waits}print('noise', end='')\n"
    write(script, body + f"report('layer 2 of 2')\nreturn {{'heard': Path({str(heard)!r}).exists()}}")
    arrived: list[str] = []
    ended = threading.Event()

    def watch() -> None:
        messages = tmp_path / "messages.jsonl"
        while not ended.wait(0.2):
            for line in messages.read_text().splitlines() if messages.exists() else []:
                said = json.loads(line)
                if said["method"] == "log" and said["params"]["message"] not in arrived:
                    arrived.append(said["params"]["message"])
                    heard.touch()

    watcher = threading.Thread(target=watch)
    watcher.start()
    workers = Workers(elsewhere.settings, print, launcher=launcher(elsewhere.settings, print))
    workers.bootstrap = lambda _: contextlib.nullcontext(variables)
    result = workers(ENVIRONMENT, script, {}, tmp_path)
    time.sleep(0.5)
    ended.set()
    watcher.join()
    assert arrived == ["layer 1 of 2", "layer 2 of 2"]
    assert result == {"heard": True}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("raise WorkerError('no GPU here: use `gptqmodel`')", r"no GPU here: use `gptqmodel` \(full output"),
        ("return 1 / 0", "(?s)ended with status 1.*ZeroDivisionError"),
        ("os.kill(os.getpid(), 9)", "was killed"),
    ],
)
def test_how_it_failed_is_told_as_if_it_had_run_here(
    elsewhere: Elsewhere, script: Path, tmp_path: Path, body: str, told: str
) -> None:
    with pytest.raises(WorkerFailed, match=told):
        elsewhere.run(write(script, body), tmp_path)


SLEEPS = "Path({began!r}).write_text(str(time.time_ns()))\ntime.sleep({seconds})\nreturn {{'slept': True}}"

RUN = """
import sys
from pathlib import Path
from pipeline.workers.launchers.configured import launcher
from pipeline.settings import Settings
from pipeline.workers.runner import Workers

settings = Settings.read()
workers = Workers(settings, lambda text: print(text, flush=True), launcher=launcher(settings, print))
workers(sys.argv[1], Path(sys.argv[2]), {}, Path(sys.argv[3]))
"""


def start(elsewhere: Elsewhere, script: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", RUN, ENVIRONMENT, str(script), str(folder)]
    return subprocess.Popen(command, env=dict(elsewhere.variables), cwd=CHECKOUT)


def wait_for(path: Path) -> int:
    deadline = time.monotonic() + 300
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return int(path.read_text())


def test_an_interrupted_run_ends_its_worker_there(elsewhere: Elsewhere, script: Path, tmp_path: Path) -> None:
    process = start(elsewhere, write(script, SLEEPS.format(began=str(tmp_path / "began"), seconds=600)), tmp_path)
    wait_for(tmp_path / "began")
    process.send_signal(signal.SIGINT)
    process.wait(120)
    wait_until_gone(script)
    assert not list((elsewhere.cluster.homes[1] / "scratch").iterdir())


def test_after_a_killed_run_the_next_one_follows_the_same_job(
    elsewhere: Elsewhere, script: Path, tmp_path: Path
) -> None:
    write(script, SLEEPS.format(began=str(tmp_path / "began"), seconds=6))
    before = len(elsewhere.jobs())
    process = start(elsewhere, script, tmp_path)
    began = wait_for(tmp_path / "began")
    process.kill()
    process.wait()
    (tmp_path / "again").mkdir()
    assert elsewhere.run(script, tmp_path / "again") == {"slept": True}
    assert int((tmp_path / "began").read_text()) == began
    assert len(elsewhere.jobs()) == before + 1


def test_a_cluster_that_is_not_there_is_named(
    elsewhere: Elsewhere, script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_PATIENCE_SECONDS", 1)
    address = f"http://127.0.0.1:{free_port()}"
    (tmp_path / "workers.yaml").write_text(f"launcher: ray\naddress: {address}\nstore: s3://{BUCKET}/artifacts\n")
    gone = replace(elsewhere, settings=replace(elsewhere.settings, workers=tmp_path / "workers.yaml"))
    with pytest.raises(UnansweredError, match=rf"the Ray cluster at {address} does not answer: .*refused"):
        gone.run(write(script, "return {}"), tmp_path)
