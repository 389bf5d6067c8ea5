"""What a worker leaves is read as what a stranger left: no link is followed, nothing blocks, nothing is endless."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from dagster_pipes import PipesDefaultMessageWriter

from pipeline.errors import WorkerFailed
from pipeline.settings import Settings
from pipeline.workers.launchers import remote_job
from pipeline.workers.launchers.task import LOG, MESSAGES, RESULT, RESULT_BYTES, Ended, Task
from pipeline.workers.messages import WorkerMessages
from pipeline.workers.runner import Workers
from registry.atomic_write import write_atomically
from registry.errors import UntrustedFileError

Leave = Callable[[Path], object]


def run(tmp_path: Path, leave: Leave, status: int = 0) -> dict[str, object]:
    """Run a worker that leaves in its folder what ``leave`` does."""
    folder, output = tmp_path / "folder", tmp_path / "output"
    folder.mkdir()
    output.mkdir()

    def launcher(task: Task) -> Ended:
        (task.folder / LOG).write_text("what it printed\n")
        leave(task.folder)
        return Ended(status, 1.0)

    settings = Settings.read({"SLIPWAY_HOME": str(tmp_path / "home")})
    return Workers(settings, print, launcher=launcher)("e", Path("s.py"), {"output": output}, folder)


def test_a_result_that_is_a_link_is_not_read(tmp_path: Path, outside: Path) -> None:
    outside.write_text('{"result": {"taken": true}}')
    with pytest.raises(UntrustedFileError, match=RESULT):
        run(tmp_path, lambda folder: (folder / RESULT).symlink_to(outside))


def test_a_result_that_is_a_fifo_does_not_block(tmp_path: Path) -> None:
    with pytest.raises(UntrustedFileError, match=RESULT):
        run(tmp_path, lambda folder: os.mkfifo(folder / RESULT))


def test_a_result_without_end_is_not_read(tmp_path: Path) -> None:
    def leave(folder: Path) -> None:
        with (folder / RESULT).open("wb") as stream:
            stream.truncate(RESULT_BYTES + 1)

    with pytest.raises(UntrustedFileError, match=RESULT):
        run(tmp_path, leave)


@pytest.mark.parametrize("text", ["[1]", "{", '{"result": 3}', "[" * 100_000])
def test_a_result_that_is_no_document_is_a_failed_worker(tmp_path: Path, text: str) -> None:
    with pytest.raises(WorkerFailed):
        run(tmp_path, lambda folder: (folder / RESULT).write_text(text))


def test_a_log_that_is_a_link_is_not_copied_into_the_home(tmp_path: Path, outside: Path) -> None:
    def leave(folder: Path) -> None:
        (folder / LOG).unlink()
        (folder / LOG).symlink_to(outside)

    with pytest.raises(UntrustedFileError, match=LOG):
        run(tmp_path, leave, status=1)


def test_an_output_with_a_link_is_refused_before_anybody_reads_it(tmp_path: Path, outside: Path) -> None:
    def leave(folder: Path) -> None:
        (folder / RESULT).write_text('{"result": {}}')
        (tmp_path / "output" / "answers.json").symlink_to(outside)

    with pytest.raises(UntrustedFileError, match=r"answers\.json"):
        run(tmp_path, leave)


@pytest.mark.parametrize("name", [LOG, RESULT])
def test_a_node_sends_no_file_that_a_link_leads_to(tmp_path: Path, outside: Path, name: str) -> None:
    folder = tmp_path / "remote-job"
    work = folder / "work"
    work.mkdir(parents=True)
    (folder / "out").mkdir()
    (work / LOG).write_text("log")
    (work / name).unlink(missing_ok=True)
    (work / name).symlink_to(outside)
    with pytest.raises(UntrustedFileError, match=name):
        remote_job.pack(Ended(0, 1.0), Task("e", Path("s.py"), {}, work, {}), folder, _Store())  # type: ignore[arg-type]


def test_a_node_gives_its_worker_no_file_from_outside_the_remote_job(tmp_path: Path) -> None:
    asked = remote_job.RemoteJob(environment="e", script="s.py", request={"model": {"slipway.file": "/etc"}}, inputs={})
    with pytest.raises(WorkerFailed, match="outside"):
        remote_job.unpack(asked, tmp_path, _Store())  # type: ignore[arg-type]


def test_a_request_is_not_written_through_a_link_that_an_earlier_worker_left(tmp_path: Path, outside: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "request.json").symlink_to(outside)
    write_atomically(folder / "request.json", "{}")
    assert (folder / "request.json").read_text() == "{}"
    assert outside.read_text() == "secret"


class _Store:
    """Nothing may get here."""

    def has(self, _: object) -> bool:
        raise AssertionError("a file was about to be sent")


class _Handler:
    """Keeps what Dagster would be told."""

    def __init__(self) -> None:
        self.messages: list[object] = []
        self.failed = threading.Event()

    def handle_message(self, message: object) -> None:
        self.messages.append(message)

    def report_pipes_framework_exception(self, _origin: str, _error: object) -> None:
        self.failed.set()


def test_messages_are_those_of_the_file_that_was_made_and_of_no_other(tmp_path: Path) -> None:
    handler, other = _Handler(), tmp_path / "other"
    other.write_text('{"method": "stolen"}\n')
    with WorkerMessages(tmp_path).read_messages(handler) as told:  # type: ignore[arg-type]
        path = Path(told[PipesDefaultMessageWriter.FILE_PATH_KEY])
        assert path == tmp_path / MESSAGES
        with path.open("a") as stream:
            stream.write('{"method": "log"}\n')
        path.unlink()
        path.symlink_to(other)
    assert handler.messages == [{"method": "log"}]


def test_what_is_no_message_ends_the_reading_and_not_the_run(tmp_path: Path) -> None:
    handler = _Handler()
    with WorkerMessages(tmp_path).read_messages(handler):  # type: ignore[arg-type]
        (tmp_path / MESSAGES).write_text("no message\n")
    assert handler.messages == []
    assert handler.failed.is_set()
