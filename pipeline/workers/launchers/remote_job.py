"""A task that is done on another machine: what it reads goes there by digest, what it makes comes back by digest.

A remote job is a document in the object store, named by its own digest, that names everything the worker reads by its
content; its outcome is another. Every file is checked where it arrives, on the way there and on the way back, so that
neither the store nor the network is trusted with more than being there.

    remote job   {"environment", "script", "request", "inputs": {"in/0/model.safetensors": {"sha256", "size"}}}
    outcome  {"status", "seconds", "result", "log", "outputs": {"model.safetensors": {"sha256", "size"}}}
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dagster_pipes import PIPES_PROTOCOL_VERSION, PIPES_PROTOCOL_VERSION_FIELD
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from pipeline.errors import WorkerFailed
from pipeline.resources import PACKAGES
from pipeline.workers.launchers.task import LOG, LOG_BYTES, OUTPUT, RESULT, RESULT_BYTES, Ended, Task
from registry import untrusted
from registry.atomic_write import write_atomically
from registry.manifest import FileRecord, RelativePath
from registry.objects import ObjectStore, digest_of

D = TypeVar("D", bound="_Document")
_OUTCOME = "slipway.outcome"
# In a request on its way, a file is named {_FILE: its place in the worker's folder there}.
_FILE = "slipway.file"
_RELATIVE = TypeAdapter[str](RelativePath)


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RemoteJob(_Document):
    """What is to be done, its files by content; ``script`` is a path below the folder of the packages."""

    environment: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    script: RelativePath
    request: Mapping[str, Any]
    inputs: Mapping[RelativePath, FileRecord]


class Outcome(_Document):
    """What came of it: the worker's exit status and seconds, its result, its output's files and its log."""

    status: int
    seconds: float
    result: FileRecord | None
    log: FileRecord
    outputs: Mapping[RelativePath, FileRecord]


def send(task: Task, store: ObjectStore) -> FileRecord:
    """Put what a task reads into the store, and return the remote job's own record there.

    Raises:
        TrackingError: the store refuses.
    """
    found: dict[str, Path] = {}

    def named(path: Path) -> dict[str, str]:
        place = f"in/{len(found)}/{path.name}"
        if path.is_dir():
            found.update({f"{place}/{file.relative_to(path)}": file for file in path.rglob("*") if file.is_file()})
        else:
            found[place] = path
        return {_FILE: place}

    request = {key: {_FILE: "out"} if key == OUTPUT else _replaced(task.request[key], named) for key in task.request}
    inputs = {place: put(path, store) for place, path in sorted(found.items())}
    remote_job = RemoteJob(
        environment=task.environment,
        script=task.script.relative_to(PACKAGES).as_posix(),
        request=request,
        inputs=inputs,
    )
    return put_document(remote_job, task.folder / "remote_job.json", store)


def receive(outcome: FileRecord, task: Task, store: ObjectStore) -> Ended:
    """Fetch what came of a remote job to where the task wants it, each file with its digest.

    Raises:
        TrackingError: the store refuses, or holds something else.
        WorkerFailed: the outcome is none, or too large.
    """
    told = get_document(Outcome, outcome, task.folder / "outcome.json", store)
    for name, record, limit in ((LOG, told.log, LOG_BYTES), (RESULT, told.result, RESULT_BYTES)):
        if record is not None:
            if record.size > limit:
                raise WorkerFailed(f"the worker's {name} has {record.size} bytes; at most {limit} are fetched")
            store.get(record, task.folder / name)
    for name, record in told.outputs.items():
        target = Path(task.request[OUTPUT]) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        store.get(record, target)
    return Ended(told.status, told.seconds)


def unpack(remote_job: RemoteJob, folder: Path, store: ObjectStore) -> Task:
    """Fetch what a remote job reads into a folder of this machine, and return the task that it is here.

    Raises:
        TrackingError: the store refuses, or holds something else.
        WorkerFailed: it names a file outside its folder.
    """
    for place, record in remote_job.inputs.items():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        store.get(record, target)
    (folder / "out").mkdir()
    work = folder / "work"
    work.mkdir()
    try:
        request = _placed(remote_job.request, folder)
    except ValidationError as error:
        raise WorkerFailed(f"the remote job names a file outside its folder: {error.errors()[0]['msg']}") from error
    return Task(remote_job.environment, PACKAGES / remote_job.script, request, work, {})


def pack(ended: Ended, task: Task, folder: Path, store: ObjectStore) -> Outcome:
    """Put what a worker left into the store, and say what it is.

    Raises:
        UntrustedFileError: it left something else than regular files, or a log or result that is too large.
    """
    output = folder / "out"
    made = untrusted.plain_files(output)
    log = _kept(task, LOG, LOG_BYTES, folder)
    if log is None:
        raise WorkerFailed(f"the worker removed its {LOG}")
    result = _kept(task, RESULT, RESULT_BYTES, folder)
    return Outcome(
        status=ended.status,
        seconds=ended.seconds,
        result=None if result is None else put(result, store),
        log=put(log, store),
        outputs={name: put(output / name, store) for name in made},
    )


def _kept(task: Task, name: str, limit: int, folder: Path) -> Path | None:
    """Copy a file of the worker's folder to where no worker writes, and return that; None where there is none."""
    try:
        with untrusted.open_file(task.folder, name, limit) as left, (folder / name).open("wb") as kept:
            shutil.copyfileobj(left, kept)
    except FileNotFoundError:
        return None
    return folder / name


def announced(outcome: FileRecord) -> str:
    """One line that says where a remote job's outcome is, as a message of Dagster Pipes, which others read as one."""
    payload = {_OUTCOME: outcome.model_dump()}
    method = {"method": "report_custom_message", "params": {"payload": payload}}
    return json.dumps({PIPES_PROTOCOL_VERSION_FIELD: PIPES_PROTOCOL_VERSION, **method})


def message(line: str) -> dict[str, Any] | None:
    """The message of Dagster Pipes that a line of a log is, or None."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and PIPES_PROTOCOL_VERSION_FIELD in found else None


def outcome_in(payload: object) -> FileRecord | None:
    """Where the outcome is, if a message's payload says so (see `announced`)."""
    if not isinstance(payload, dict) or _OUTCOME not in payload:
        return None
    try:
        return FileRecord.model_validate(payload[_OUTCOME])
    except ValidationError as error:
        raise WorkerFailed(f"the job names an outcome that is not valid: {error.errors()[0]['msg']}") from error


def node_command(store: str, remote_job: FileRecord) -> list[str]:
    """The command that runs a remote job on its node (`pipeline.workers.launchers.node`)."""
    return ["python", "-m", "pipeline.workers.launchers.node", store, remote_job.sha256, str(remote_job.size)]


def put(path: Path, store: ObjectStore) -> FileRecord:
    """Put a file into the store, where nothing of its name and size is there, and return its record."""
    record = FileRecord(sha256=digest_of(path), size=path.stat().st_size)
    if not store.has(record):
        store.put(path, record)
    return record


def put_document(document: _Document, path: Path, store: ObjectStore) -> FileRecord:
    """Write a document to ``path`` and into the store; return its record."""
    write_atomically(path, document.model_dump_json())
    return put(path, store)


def get_document(kind: type[D], record: FileRecord, path: Path, store: ObjectStore) -> D:
    """Fetch a document to ``path``, and parse it."""
    store.get(record, path)
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise WorkerFailed(f"{store.uri} holds no {kind.__name__.lower()} under {record.sha256}: {error}") from error


def _replaced(value: Any, by: Callable[[Path], Any]) -> Any:  # noqa: ANN401 - any JSON value
    """The value with every path in it replaced."""
    if isinstance(value, Path):
        return by(value)
    if isinstance(value, Mapping):
        return {key: _replaced(item, by) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, by) for item in value]
    return value


def _placed(value: Any, folder: Path) -> Any:  # noqa: ANN401 - any JSON value
    """The value with every file's name in it replaced by its path here."""
    if isinstance(value, Mapping):
        if set(value) == {_FILE}:
            return folder / _RELATIVE.validate_python(value[_FILE])
        return {key: _placed(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_placed(item, folder) for item in value]
    return value
