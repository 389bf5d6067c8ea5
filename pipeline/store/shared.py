"""Artifacts that homes share through object storage: files by digest, found by the keys of their recipes.

A home fetches what another home has made: pulled weights, checkpoints, layer errors, and answers from a GPU. Not shared
are images, which every machine builds identically, and scans, load tests and answers from a CPU, which depend on the
machine.

    PREFIX/artifacts/STAGE/KEY.json     the files with their digests, and the notes; written last
    PREFIX/sha256/HEX                   a file's content (`registry.objects`)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe, Store, require_room
from registry.errors import TrackingError, first_problem
from registry.manifest import FileRecord, RelativePath
from registry.objects import ObjectStore
from registry.progress import Progress

_STAGES = frozenset({"source", "quantized", "layers", "answers"})


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    files: Mapping[RelativePath, FileRecord]
    notes: Mapping[str, JsonValue]


class SharedStore(Store):
    """A home's own store, and behind it the shared artifacts in an object store.

    If the object store is unreachable or damaged, artifacts are made here, and are not shared.
    """

    def __init__(self, root: Path, floor: int, uri: str, progress: Progress) -> None:
        """Share through ``s3://BUCKET/PREFIX``; ``progress`` gets a line for each fetched or shared artifact."""
        super().__init__(root, floor)
        self.uri = uri
        self.progress = progress

    def _make(self, recipe: Recipe, place: Path, make: Callable[[ArtifactDraft], None]) -> Artifact:
        if not _is_shared(recipe):
            return super()._make(recipe, place, make)
        objects = ObjectStore.opened(self.uri)
        mend = False
        try:
            record = _record(recipe, objects)
            if record is not None:
                return super()._make(recipe, place, lambda draft: self._fetch(record, draft, objects))
        except TrackingError as error:
            self.progress(f"the shared artifact can't be fetched, making it here: {error}")
            mend = True
        made = super()._make(recipe, place, make)
        try:
            self._share(recipe, made, objects, mend=mend)
        except TrackingError as error:
            self.progress(f"the artifact can't be shared: {error}")
        return made

    def _fetch(self, record: _Record, draft: ArtifactDraft, objects: ObjectStore) -> None:
        size = sum(file.size for file in record.files.values())
        require_room(self.root, size, self.floor, f"the shared artifact (in {self.uri})")
        self.progress(f"another home made this artifact: fetching {size / 1e6:,.1f} MB from {self.uri}")
        for name, file in record.files.items():
            target = draft.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            objects.get(file, target)
            draft.sha256[name] = file.sha256
        draft.notes.update(record.notes)

    def _share(self, recipe: Recipe, made: Artifact, objects: ObjectStore, *, mend: bool) -> None:
        self.progress(f"sharing {made.size_bytes / 1e6:,.1f} MB through {self.uri}")
        for name, file in made.files.items():
            if mend or not objects.has(file):
                objects.put(made.folder / name, file, anew=True)
        objects.note(_name(recipe), _Record(files=made.files, notes=made.notes).model_dump_json(indent=1))


def _is_shared(recipe: Recipe) -> bool:
    engine = recipe.parameters.get("engine")
    on_cpu = isinstance(engine, Mapping) and engine.get("device") == "cpu"
    return recipe.stage in _STAGES and not on_cpu


def _record(recipe: Recipe, objects: ObjectStore) -> _Record | None:
    text = objects.noted(_name(recipe))
    try:
        return None if text is None else _Record.model_validate_json(text)
    except ValidationError as error:
        raise TrackingError(f"{objects.uri}: {_name(recipe)} is not a valid record: {first_problem(error)}") from error


def _name(recipe: Recipe) -> str:
    return f"artifacts/{recipe.stage}/{recipe.key}.json"
