"""A worker's files by digest through real object storage: there and back, checked at both ends."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import boto3
import pytest
from real_server import BUCKET

from checkout import CHECKOUT
from pipeline.errors import WorkerFailed
from pipeline.settings import Settings
from pipeline.workers.environments import ensure_environment
from pipeline.workers.launchers import remote_job
from pipeline.workers.launchers.node import do
from pipeline.workers.launchers.remote_job import announced, is_message, outcome_in, receive, send
from pipeline.workers.launchers.task import Ended, Task
from registry.errors import TrackingError, UntrustedFileError
from registry.manifest import FileRecord
from registry.objects import ObjectStore, digest_local

# Copies what it reads, tells of its environment; in the checkout of a test, as the real ones are in ours.
SCRIPT = """
import os
from pathlib import Path
from slipway_worker import main

def work(request, report):
    report("copying")
    output = Path(request["output"])
    for path in Path(request["model"]).iterdir():
        (output / "sub").mkdir(exist_ok=True)
        (output / "sub" / path.name).write_bytes(path.read_bytes())
    (output / "text.txt").write_text(Path(request["deep"][0]["text"]).read_text().upper())
    if request["link"]:
        (output / "link").symlink_to("text.txt")
    return {"names": sorted(os.environ), "bits": request["bits"]}

if __name__ == "__main__":
    main(work)
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    checkout, source, folder = tmp_path / "checkout", tmp_path / "source", tmp_path / "folder"
    for made in (checkout, source, folder, tmp_path / "elsewhere", tmp_path / "output"):
        made.mkdir()
    monkeypatch.setattr(remote_job, "PACKAGES", checkout)
    (checkout / "script.py").write_text(SCRIPT)
    (source / "model.safetensors").write_bytes(os.urandom(3_000_000))
    (tmp_path / "text.txt").write_text("text")
    (source / "config.json").symlink_to(tmp_path / "text.txt")  # as a view of a source has it
    request = {
        "model": source, "output": tmp_path / "output", "deep": [{"text": tmp_path / "text.txt"}],
        "bits": 4, "link": False,
    }  # fmt: skip
    return Task("aiperf", checkout / "script.py", request, folder, {})


def run(task: Task, store: ObjectStore, settings: Settings, tmp_path: Path) -> Ended:
    return receive(do(send(task, store), store, tmp_path / "elsewhere", settings), task, store)


def test_what_a_worker_reads_goes_there_and_what_it_makes_comes_back(
    task: Task, store: ObjectStore, settings: Settings, tmp_path: Path
) -> None:
    ended = run(task, store, settings, tmp_path)
    assert ended.status == 0
    output = tmp_path / "output"
    assert (output / "text.txt").read_text() == "TEXT"
    assert (output / "sub" / "config.json").read_text() == "text"
    assert digest_local(output / "sub" / "model.safetensors") == digest_local(tmp_path / "source" / "model.safetensors")
    result = (task.folder / "result.json").read_text()
    assert '"bits": 4' in result
    assert "AWS_SECRET_ACCESS_KEY" not in result
    assert (task.folder / "output.log").exists()


def test_what_is_there_already_is_not_sent_again(task: Task, store: ObjectStore) -> None:
    assert send(task, store) == send(task, store)
    before = list(objects())
    send(replace(task, request={**task.request, "bits": 3}), store)
    assert len(list(objects())) == len(before) + 1  # the remote job itself


def objects() -> Iterator[str]:
    for page in boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        yield from (item["Key"] for item in page.get("Contents", ()))


def spoil(store: ObjectStore, sha256: str, content: bytes) -> None:
    bucket, key = store.place(sha256)
    boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=content)


def test_what_is_damaged_on_the_way_there_is_refused_before_it_is_used(
    task: Task, store: ObjectStore, settings: Settings, tmp_path: Path
) -> None:
    sent = send(task, store)
    spoil(store, digest_local(tmp_path / "text.txt"), b"TAXT")
    with pytest.raises(TrackingError, match="damaged"):
        do(sent, store, tmp_path / "elsewhere", settings)


def test_what_is_damaged_on_the_way_back_is_refused(
    task: Task, store: ObjectStore, settings: Settings, tmp_path: Path
) -> None:
    outcome = do(send(task, store), store, tmp_path / "elsewhere", settings)
    spoil(store, digest_local(tmp_path / "elsewhere" / "out" / "text.txt"), b"TAXT")
    with pytest.raises(TrackingError, match="damaged"):
        receive(outcome, task, store)
    assert not (tmp_path / "output" / "text.txt").exists()


@pytest.mark.parametrize("name", ["../escaped.txt", "/escaped.txt", "a/../../escaped.txt"])
def test_an_outcome_that_leaves_its_folder_is_refused(
    task: Task, store: ObjectStore, settings: Settings, tmp_path: Path, name: str
) -> None:
    outcome = do(send(task, store), store, tmp_path / "elsewhere", settings)
    store.get(outcome, tmp_path / "outcome.json")
    (tmp_path / "outcome.json").write_text((tmp_path / "outcome.json").read_text().replace("text.txt", name))
    with pytest.raises(WorkerFailed, match="is not a valid Outcome"):
        receive(remote_job.put(tmp_path / "outcome.json", store), task, store)
    assert not list(tmp_path.rglob("escaped.txt"))


def test_a_link_in_the_output_is_refused(task: Task, store: ObjectStore, settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(UntrustedFileError, match="link"):
        run(replace(task, request={**task.request, "link": True}), store, settings, tmp_path)


def test_by_the_command_a_remote_job_says_where_its_outcome_is(
    home: dict[str, str],
    settings: Settings,
    task: Task,
    store: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the command line, with what a node's image has, it is the real checkout's: a script that fails in words."""
    calibration = tmp_path / "text.txt"
    request = {"output": task.request["output"], "source": task.request["model"], "calibration": calibration}
    real = replace(task, script=CHECKOUT / "evals" / "load" / "traffic" / "client.py", request=request)
    monkeypatch.setattr(remote_job, "PACKAGES", CHECKOUT)
    sent = send(real, store)
    python = ensure_environment("node", settings, print) / "bin" / "python"
    command: list[str | Path] = [
        python,
        "-m",
        "pipeline.workers.launchers.node",
        store.uri,
        sent.sha256,
        str(sent.size),
    ]
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    small = {**home, **aws, "PYTHONTZPATH": ""}  # its image has no table of zones
    done = subprocess.run(command, env=small, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outcome = outcome_in(done.stdout.splitlines()[-1])
    assert outcome is not None
    assert receive(outcome, real, store).status == 1
    assert "Traceback" in (real.folder / "output.log").read_text()


def test_an_announcement_is_heard_and_nothing_else_is() -> None:
    record = FileRecord(sha256="a" * 64, size=3)
    assert is_message(announced(record))
    assert outcome_in(announced(record)) == record
    for line in ("layer 1 of 2", '{"layer": 1}'):
        assert not is_message(line)
        assert outcome_in(line) is None
