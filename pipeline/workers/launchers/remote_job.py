"""A task that runs on another machine: its input and output files travel through an object store, named by digest.

A `RemoteJob` is a document in the store, named by its own digest. It lists every file that the worker reads with its
digest. Its `Outcome` is another document. Each side checks the digest of every file that it fetches, so the store and
the network need not be trusted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar, cast

from dagster_pipes import PIPES_PROTOCOL_VERSION, PIPES_PROTOCOL_VERSION_FIELD
from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from pipeline.errors import WorkerFailed
from pipeline.resources import PACKAGES
from pipeline.workers.launchers.task import LOG, LOG_BYTES, OUTPUT, RESULT, RESULT_BYTES, Ended, Task
from registry import untrusted
from registry.atomic_write import write_atomically
from registry.errors import first_problem
from registry.manifest import FileRecord, RelativePath
from registry.objects import ObjectStore, digest_local

D = TypeVar("D", bound="_Document")
_OUTCOME = "slipway.outcome"
# In a remote job's request, a file is written as {_FILE: its path in the worker's folder on the node}.
_FILE = "slipway.file"
_RELATIVE = TypeAdapter[str](RelativePath)


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RemoteJob(_Document):
    """A worker's task; ``inputs`` lists its files by path. ``script`` is a path below the packages' folder."""

    environment: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    script: RelativePath
    request: Mapping[str, JsonValue]
    inputs: Mapping[RelativePath, FileRecord]


class Outcome(_Document):
    """How a worker ended: its exit status, its duration in seconds, and its result, log and output files."""

    status: int
    seconds: float
    result: FileRecord | None
    log: FileRecord
    outputs: Mapping[RelativePath, FileRecord]


def send(task: Task, store: ObjectStore) -> FileRecord:
    """Put the files that a task reads into the store, and return the record of its `RemoteJob` there.

    Raises:
        TrackingError: the store refuses.
    """
    found: dict[str, Path] = {}

    def named(path: Path) -> JsonValue:
        place = f"in/{len(found)}/{path.name}"
        if path.is_dir():
            found.update({f"{place}/{file.relative_to(path)}": file for file in path.rglob("*") if file.is_file()})
        else:
            found[place] = path
        return {_FILE: place}

    request = {key: {_FILE: "out"} if key == OUTPUT else _replaced(value, named) for key, value in task.request.items()}
    inputs = {place: put(path, store) for place, path in sorted(found.items())}
    remote_job = RemoteJob(
        environment=task.environment,
        script=task.script.relative_to(PACKAGES).as_posix(),
        request=request,
        inputs=inputs,
    )
    return put_document(remote_job, task.folder / "remote_job.json", store)


def receive(outcome: FileRecord, task: Task, store: ObjectStore) -> Ended:
    """Fetch a remote job's result, log and output files to the task's folders, and check their digests.

    Raises:
        TrackingError: the store refuses, or holds something else.
        WorkerFailed: the outcome is not valid, or too large.
    """
    ended = get_document(Outcome, outcome, task.folder / "outcome.json", store)
    for name, record, limit in ((LOG, ended.log, LOG_BYTES), (RESULT, ended.result, RESULT_BYTES)):
        if record is not None:
            if record.size > limit:
                raise WorkerFailed(f"the worker's {name} has {record.size} bytes; at most {limit} are fetched")
            store.get(record, task.folder / name)
    for name, record in ended.outputs.items():
        target = output_folder(task.request) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        store.get(record, target)
    return Ended(ended.status, ended.seconds)


def output_folder(request: Mapping[str, object]) -> Path:
    """The folder that a request asks the worker to fill.

    Raises:
        WorkerFailed: it names none.
    """
    folder = request.get(OUTPUT)
    if not isinstance(folder, str | Path):
        raise WorkerFailed(f"the request names no `{OUTPUT}` folder, and the worker's outcome has output files")
    return Path(folder)


def unpack(remote_job: RemoteJob, folder: Path, store: ObjectStore) -> Task:
    """Fetch the files that a remote job reads into a folder of this machine, and return the task to run here.

    Raises:
        TrackingError: the store refuses, or holds something else.
        WorkerFailed: the job names a file outside its folder.
    """
    for place, record in remote_job.inputs.items():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        store.get(record, target)
    (folder / "out").mkdir()
    work = folder / "work"
    work.mkdir()
    try:
        request = {key: _placed(value, folder) for key, value in remote_job.request.items()}
    except ValidationError as error:
        raise WorkerFailed(f"the remote job names a file outside its folder: {first_problem(error)}") from error
    return Task(remote_job.environment, PACKAGES / remote_job.script, request, work, {})


def pack(ended: Ended, task: Task, folder: Path, store: ObjectStore) -> Outcome:
    """Put a worker's result, log and output files into the store, and return the `Outcome` that lists them.

    Raises:
        UntrustedFileError: the worker left something other than regular files, or too large a log or result.
        WorkerFailed: the worker removed its log.
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
    """Copy a file from the worker's folder to one that the worker can't write to; None if there is no such file."""
    try:
        with untrusted.open_file(task.folder, name, limit) as left, (folder / name).open("wb") as kept:
            shutil.copyfileobj(left, kept)
    except FileNotFoundError:
        return None
    return folder / name


def announced(outcome: FileRecord) -> str:
    """Return the line that announces an outcome's record in the store: a custom message of Dagster Pipes."""
    payload = {_OUTCOME: outcome.model_dump()}
    method = {"method": "report_custom_message", "params": {"payload": payload}}
    return json.dumps({PIPES_PROTOCOL_VERSION_FIELD: PIPES_PROTOCOL_VERSION, **method})


def is_message(line: str) -> bool:
    """Whether a line of a job's log is a message of Dagster Pipes."""
    return _message(line) is not None


def outcome_in(line: str) -> FileRecord | None:
    """Return the record of the outcome that a line of a job's log announces (see `announced`); else None.

    Raises:
        WorkerFailed: the line announces an outcome whose record is not valid.
    """
    found = _message(line) or {}
    parameters = found.get("params")
    payload = parameters.get("payload") if isinstance(parameters, dict) else None
    if not isinstance(payload, dict) or _OUTCOME not in payload:
        return None
    try:
        return FileRecord.model_validate(payload[_OUTCOME])
    except ValidationError as error:
        raise WorkerFailed(f"the job's record of its outcome is not valid: {first_problem(error)}") from error


def _message(line: str) -> dict[str, JsonValue] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and PIPES_PROTOCOL_VERSION_FIELD in found else None


def node_command(store: str, remote_job: FileRecord) -> list[str]:
    """The command that runs a remote job on its node (`pipeline.workers.launchers.node`)."""
    return ["python", "-m", "pipeline.workers.launchers.node", store, remote_job.sha256, str(remote_job.size)]


def put(path: Path, store: ObjectStore) -> FileRecord:
    """Put a file into the store, unless it is there already, and return its record."""
    record = FileRecord(sha256=digest_local(path), size=path.stat().st_size)
    if not store.has(record):
        store.put(path, record)
    return record


def put_document(document: _Document, path: Path, store: ObjectStore) -> FileRecord:
    """Write a document to ``path`` and into the store; return its record."""
    write_atomically(path, document.model_dump_json())
    return put(path, store)


def get_document(kind: type[D], record: FileRecord, path: Path, store: ObjectStore) -> D:
    """Fetch a document to ``path``, and parse it; `WorkerFailed` if it is not valid."""
    store.get(record, path)
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise WorkerFailed(f"{store.uri}: {record.sha256} is not a valid {kind.__name__}: {error}") from error


def _replaced(value: object, by: Callable[[Path], JsonValue]) -> JsonValue:
    """The value with every path in it replaced; `RemoteJob` refuses what JSON can't hold."""
    if isinstance(value, Path):
        return by(value)
    if isinstance(value, Mapping):
        return {key: _replaced(item, by) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, by) for item in value]
    return cast("JsonValue", value)


def _placed(value: JsonValue, folder: Path) -> object:
    """The value with every file's name in it replaced by its path on this machine."""
    if isinstance(value, Mapping):
        if set(value) == {_FILE}:
            return folder / _RELATIVE.validate_python(value[_FILE])
        return {key: _placed(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_placed(item, folder) for item in value]
    return value
