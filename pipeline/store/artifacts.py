"""Content-addressed artifacts, written once.

The law of the store: an artifact's *key* is the digest of what determines it (stage, inputs' digests, parameters,
worker's pins, code version); its *digest* is that of what it holds (every file's path, size and sha256). A key is
complete or absent: a stage writes to another folder, everything is synced, and one rename publishes it. Files are
read-only.

    ROOT/<stage>/<key>/artifact.json    the record
    ROOT/<stage>/<key>/files/…          what the stage made
    ROOT/<stage>/<key>.lock             held while a process makes it
    ROOT/.making/<stage>-<key>/         incomplete; removed by the next holder of the lock, except `FINISHED` in it
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from pipeline.errors import PlanError, StoreError
from registry.atomic_write import write_atomically
from registry.digests import digest_file, digest_json
from registry.errors import first_problem
from registry.file_locks import locked, locked_if_free
from registry.file_systems import set_mode, sync_folder
from registry.manifest import FileRecord

Notes = TypeVar("Notes", bound=BaseModel)
_RECORD = "artifact.json"
# What a stage puts into this folder of its scratch stays when it fails or is killed, for the next try at the same key.
FINISHED = "finished"
_SCRATCH = "scratch"


@dataclass(frozen=True)
class Recipe:
    """What determines an artifact. Two equal recipes make the same artifact."""

    stage: str
    inputs: Mapping[str, str]
    parameters: Mapping[str, object]
    code: str
    pins: str = ""

    @property
    def key(self) -> str:
        """64 hex digits."""
        return digest_json(asdict(self)).removeprefix("sha256:")


@dataclass(frozen=True)
class ArtifactDraft:
    """The folders that a stage fills: ``folder`` becomes the artifact, ``scratch`` is removed afterwards.

    Where a try fails or is killed, `FINISHED` in ``scratch`` stays: the next try at the same key finds it there.

    Digests that the stage knows already go into ``sha256`` (path → 64 hex digits), so that these files are not
    read again; it adds its workers' durations to ``worker_seconds``, and notes what later stages need and no digest
    should cover.
    """

    folder: Path
    scratch: Path
    sha256: dict[str, str] = field(default_factory=dict)
    worker_seconds: list[float] = field(default_factory=list)
    notes: dict[str, JsonValue] = field(default_factory=dict)

    def note(self, notes: BaseModel) -> None:
        """Add what is set in ``notes``, which `Artifact.noted` returns."""
        self.notes.update(notes.model_dump(mode="json", exclude_unset=True))


class ArtifactRecord(BaseModel):
    """``artifact.json``: what an artifact was made from, what it holds, and how long making it took, in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Recipe
    digest: str
    files: Mapping[str, FileRecord]
    notes: Mapping[str, JsonValue]
    seconds: float
    worker_seconds: float
    created: str


@dataclass(frozen=True)
class Artifact:
    """A complete artifact.

    ``inputs`` are the digests of the artifacts that it was made from; ``seconds`` is how long making it took;
    ``cached`` is whether it existed already.
    """

    stage: str
    key: str
    digest: str
    folder: Path
    files: Mapping[str, FileRecord]
    inputs: Mapping[str, str]
    notes: Mapping[str, JsonValue]
    seconds: float
    worker_seconds: float
    created: str
    cached: bool

    def document(self, name: str) -> Any:  # noqa: ANN401 - JSON is what the caller expects it to be
        """Parse a JSON file of the artifact that the project does not write itself, such as ``config.json``."""
        return json.loads((self.folder / name).read_text())

    def noted(self, kind: type[Notes]) -> Notes:
        """What the artifact's stage noted."""
        return kind.model_validate_json(json.dumps(dict(self.notes)))

    @property
    def sha256(self) -> dict[str, str]:
        """Each file's sha256, as 64 hex digits, by its path in the artifact."""
        return {name: file.sha256 for name, file in self.files.items()}

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files.values())


class Store:
    """The artifacts under one folder; safe to share between processes."""

    def __init__(self, root: Path, floor: int = 0) -> None:
        """Use ``root``, which is made with the first artifact; refuse to make artifacts below ``floor`` free bytes."""
        self.root = root
        self.floor = floor

    def find(self, stage: str, key: str) -> Artifact | None:
        """Return a stage's artifact under a key, or None.

        Raises:
            StoreError: a file is missing or has another size than when it was made, or the record can't be read.
        """
        place = self.root / stage / key
        try:
            record = _read(place)
        except FileNotFoundError:
            return None
        for name, file in record.files.items():
            path = place / "files" / name
            if not path.is_file() or path.stat().st_size != file.size:
                raise _damaged(place, f"{name} is missing or not {file.size} bytes")
        return _artifact(stage, place, record, cached=True)

    def records(self, stage: str) -> list[tuple[str, ArtifactRecord]]:
        """Every artifact of a stage as its key and record, the newest first.

        Raises:
            StoreError: a record can't be read.
        """
        found = [(path.parent.name, _read(path.parent)) for path in (self.root / stage).glob(f"*/{_RECORD}")]
        return sorted(found, key=lambda each: each[1].created, reverse=True)

    def with_digest(self, stage: str, digest: str) -> Artifact | None:
        """Return a stage's artifact with this digest, whatever its key; None if there is none."""
        keys = (key for key, record in self.records(stage) if record.digest == digest)
        return next((found for key in keys if (found := self.find(stage, key))), None)

    def obtain(self, recipe: Recipe, make: Callable[[ArtifactDraft], None]) -> Artifact:
        """Return the recipe's artifact; if it does not exist, ``make`` fills it.

        One process makes a key at a time; others wait for it. When ``make`` raises, or the process dies, nothing is
        published, and the next caller finds only what the draft keeps for it.
        """
        found = self.find(recipe.stage, recipe.key)
        if found:
            return found
        place = self.root / recipe.stage / recipe.key
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place.with_name(place.name + ".lock")):
            found = self.find(recipe.stage, recipe.key)
            if found:
                return found
            return self._make(recipe, place, make)

    def forget(self, recipe: Recipe) -> None:
        """Remove an artifact that is no longer valid, such as the record of an image that the engine has lost."""
        place = self.root / recipe.stage / recipe.key
        with locked(place.with_name(place.name + ".lock")):
            shutil.rmtree(place, ignore_errors=True)

    def _make(self, recipe: Recipe, place: Path, make: Callable[[ArtifactDraft], None]) -> Artifact:
        require_room(self.root, 0, self.floor, f"`{recipe.stage}`")
        beside = self.root / ".making" / f"{recipe.stage}-{recipe.key}"
        _remove_unfinished(beside)
        draft = ArtifactDraft(folder=beside / "artifact" / "files", scratch=beside / _SCRATCH)
        draft.folder.mkdir(parents=True)
        draft.scratch.mkdir(exist_ok=True)
        try:
            started = time.monotonic()
            make(draft)
            files = _seal(draft)
            record = ArtifactRecord(
                recipe=recipe,
                digest=digest_json({name: file.model_dump() for name, file in files.items()}),
                files=files,
                notes=draft.notes,
                seconds=time.monotonic() - started,
                worker_seconds=sum(draft.worker_seconds),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            write_atomically(beside / "artifact" / _RECORD, record.model_dump_json(indent=1))
            sync_folder(beside / "artifact")
            (beside / "artifact").rename(place)
            sync_folder(place.parent)
            shutil.rmtree(beside, ignore_errors=True)
        except OSError as error:
            raise StoreError(f"can't write artifact {place}: {error.strerror or error}") from error
        finally:
            _remove_unfinished(beside)
        return _artifact(recipe.stage, place, record, cached=False)

    def sweep(self) -> None:
        """Remove the incomplete artifacts of processes that died, except what their next try continues with."""
        for (stage, key), beside in self._unfinished().items():
            with locked_if_free(self.root / stage / f"{key}.lock") as is_free:
                if is_free:
                    _remove_unfinished(beside)

    def kept_for_next_try(self) -> dict[tuple[str, str], Path]:
        """What failed or killed tries have left for the next one, by stage and key."""
        found = {place: beside / _SCRATCH / FINISHED for place, beside in self._unfinished().items()}
        return {place: folder for place, folder in found.items() if folder.is_dir()}

    def remove_unfinished(self, place: tuple[str, str]) -> int | None:
        """Remove what is kept for the next try; return the bytes freed, or None if a process is at it."""
        stage, key = place
        with locked_if_free(self.root / stage / f"{key}.lock") as is_free:
            if not is_free:
                return None
            beside = self._unfinished().get(place)
            if beside is None:
                return 0
            freed = sum(path.stat().st_size for path in beside.rglob("*") if path.is_file())
            shutil.rmtree(beside, ignore_errors=True)
            return freed

    def _unfinished(self) -> dict[tuple[str, str], Path]:
        names = {beside: beside.name.rpartition("-") for beside in (self.root / ".making").glob("*-*")}
        return {(stage, key): beside for beside, (stage, _, key) in names.items()}


def _read(place: Path) -> ArtifactRecord:
    try:
        return ArtifactRecord.model_validate_json((place / _RECORD).read_bytes())
    except ValidationError as error:
        raise _damaged(place, f"{_RECORD}: {first_problem(error)}") from error


def _damaged(place: Path, why: str) -> StoreError:
    return StoreError(f"artifact {place} is damaged: {why}; remove that folder and run again")


def _artifact(stage: str, place: Path, record: ArtifactRecord, *, cached: bool) -> Artifact:
    return Artifact(
        stage=stage,
        key=place.name,
        digest=record.digest,
        folder=place / "files",
        files=record.files,
        inputs=record.recipe.inputs,
        notes=record.notes,
        seconds=record.seconds,
        worker_seconds=record.worker_seconds,
        created=record.created,
        cached=cached,
    )


def require_room(place: Path, needed: int, floor: int, what: str) -> None:
    """Check that ``place``'s disk has ``needed`` bytes for ``what`` and ``floor`` bytes beside.

    Raises:
        PlanError: it does not.
    """
    there = next(path for path in (place, *place.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed + floor > free:
        takes = f"needs {needed / 1e9:,.1f} GB" if needed else "can't be made"
        raise PlanError(
            f"{what} {takes}: {free / 1e9:,.1f} GB are free for {place}, and {floor / 1e9:,.1f} GB must stay free: "
            "make room (`slipway gc`), move SLIPWAY_HOME, or set SLIPWAY_DISK_FLOOR"
        )


def _remove_unfinished(beside: Path) -> None:
    """Remove an incomplete artifact, except what is kept for the next try."""
    kept = beside / _SCRATCH / FINISHED
    if kept.is_symlink() or not kept.is_dir() or not any(kept.iterdir()):
        shutil.rmtree(beside, ignore_errors=True)
        return
    for path in (*beside.iterdir(), *kept.parent.iterdir()):
        if path not in {kept, kept.parent}:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _seal(draft: ArtifactDraft) -> dict[str, FileRecord]:
    """Hash what is not hashed yet, make files read-only, and push everything to the disk."""
    files: dict[str, FileRecord] = {}
    for path in sorted(draft.folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        name = path.relative_to(draft.folder).as_posix()
        if path.is_symlink() or not path.is_file():
            raise StoreError(f"{name} is not a regular file: an artifact may hold only regular files")
        set_mode(path, 0o444)
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        files[name] = FileRecord(sha256=draft.sha256.get(name) or digest_file(path), size=path.stat().st_size)
    return files


@contextlib.contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Append the seconds that the block took, whether it ends well or not."""
    started = time.monotonic()
    try:
        yield
    finally:
        seconds.append(time.monotonic() - started)
