"""Run a remote job on this machine: ``python -m pipeline.workers.launchers.node s3://BUCKET/PREFIX SHA256 SIZE``.

It fetches the files that the remote job reads, runs its worker in its pinned environment as a process of this machine,
and puts the outcome into the store. It prints the outcome's place to stdout, as one of the messages of Dagster Pipes.
The store's credentials come from its own environment (``AWS_…``); the worker does not see them. Worker environments are
kept under ``SLIPWAY_HOME``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from dagster_pipes import (
    DAGSTER_PIPES_CONTEXT_ENV_VAR,
    DAGSTER_PIPES_MESSAGES_ENV_VAR,
    encode_param,
)

from pipeline.errors import SlipwayError
from pipeline.settings import Settings
from pipeline.workers.launchers.local import Local
from pipeline.workers.launchers.messages import lines
from pipeline.workers.launchers.remote_job import RemoteJob, announced, get_document, pack, put_document, unpack
from pipeline.workers.launchers.task import MESSAGES
from registry import untrusted
from registry.errors import RegistryError
from registry.file_locks import is_locked, locked
from registry.manifest import FileRecord
from registry.objects import ObjectStore

_LOCK = "lock"


def main() -> None:
    """Run the remote job that the arguments name."""
    uri, sha256, size = sys.argv[1:]
    # Whoever stops this process wants its worker and its files gone.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        settings = Settings.read()
        with own_folder(settings.home / "scratch") as folder:
            outcome = do(FileRecord(sha256=sha256, size=int(size)), ObjectStore.opened(uri), folder, settings)
    except (SlipwayError, RegistryError) as error:
        sys.exit(f"error: {error}")
    print(announced(outcome), flush=True)


@contextlib.contextmanager
def own_folder(scratch: Path) -> Iterator[Path]:
    """Give an empty folder below ``scratch`` and remove it at the end; remove folders of killed processes first."""
    scratch.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        # Without this lock, another process could find the folder before it is locked, and remove it as a leftover.
        with locked(scratch.with_suffix(".lock")):
            for left in scratch.glob("remote-job-*"):
                if not is_locked(left / _LOCK):
                    shutil.rmtree(left, ignore_errors=True)
            made = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="remote-job-", dir=scratch)))
            held.enter_context(locked(made / _LOCK))
        folder = made / "remote-job"
        folder.mkdir()
        yield folder


def do(record: FileRecord, store: ObjectStore, folder: Path, settings: Settings) -> FileRecord:
    """Run a remote job in an empty folder, and return its outcome's record in the store.

    Raises:
        SlipwayError, RegistryError: it could not be run. A worker that failed is an outcome and raises nothing.
    """
    remote_job = get_document(RemoteJob, record, folder / "remote_job.json", store)
    task = unpack(remote_job, folder, store)
    with _reporting(task.folder) as variables:
        ended = Local(settings, _say)(replace(task, variables=variables))
    return put_document(pack(ended, task, folder, store), folder / "outcome.json", store)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _reporting(folder: Path) -> Iterator[Mapping[str, str]]:
    """Pass on what the worker reports to this process's stdout, whole lines, whatever else it prints."""
    if DAGSTER_PIPES_CONTEXT_ENV_VAR not in os.environ:
        yield {}
        return
    ended = threading.Event()
    with untrusted.create_file(folder, MESSAGES) as stream:
        thread = threading.Thread(target=_pass_on, args=(stream.fileno(), ended), daemon=True)
        thread.start()
        try:
            yield {
                DAGSTER_PIPES_CONTEXT_ENV_VAR: os.environ[DAGSTER_PIPES_CONTEXT_ENV_VAR],
                DAGSTER_PIPES_MESSAGES_ENV_VAR: encode_param({"path": str(folder / MESSAGES)}),
            }
        finally:
            ended.set()
            thread.join()


def _pass_on(descriptor: int, ended: threading.Event) -> None:
    try:
        for line in lines(descriptor, ended):
            print(line.decode(errors="replace"), flush=True)
    except ValueError as error:
        _say(f"what the worker reports is not passed on any more: {error}")


if __name__ == "__main__":
    main()
