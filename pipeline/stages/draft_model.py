"""The model that drafts tokens, a part of the stage `image`: pinned, locked and checked like weights.

It is an artifact of its own, so that it is pulled once for all images that it is put into; each has its files too.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import BaseModel, ConfigDict

from pipeline.compatibility.description import ModelDescription
from pipeline.errors import naming
from pipeline.planner.draft_model import check, lock_of, resolve
from pipeline.sources import source as sources
from pipeline.stages.code_version import code_version
from pipeline.stages.context import StageContext
from pipeline.stages.stage import Inputs
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe, require_room
from registry import seal
from registry.manifest import DRAFT_MODEL, ReleasedDraftModel

_RECORD = "draft_model.json"


class PulledDraftModel(BaseModel):
    """Where the draft model in an image came from, and the cache that it keeps for a token, at 16 bits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    revision: str
    cache_bytes_per_token: int


def prepare(context: StageContext, _inputs: Inputs) -> StageContext:
    """Resolve the revision."""
    return replace(context, draft_model=resolve(context.spec, context.settings))


def parameters(context: StageContext) -> dict[str, object]:
    """What an image's recipe says of it."""
    resolved = context.draft_model
    return {} if resolved is None else {DRAFT_MODEL: {"uri": resolved.uri, "content": resolved.fingerprint}}


def put(context: StageContext, checkpoint: Artifact, draft: ArtifactDraft) -> PulledDraftModel | None:
    """Put the draft model into the image's artifact; it is pulled where the store does not have it.

    Raises:
        SourceError: it can't be pulled, or can't draft tokens for the checkpoint; names the key.
    """
    resolved, settings = context.draft_model, context.settings
    if resolved is None:
        return None

    def make(own: ArtifactDraft) -> None:
        require_room(settings.home, resolved.bytes, settings.disk_floor, f"{resolved.uri} (the draft model)")
        own.sha256.update(sources.pull(resolved, own.folder, settings.home / "downloads", context.progress))

    recipe = Recipe("draft_model", inputs={}, parameters=parameters(context), code=code_version(__name__))
    with naming(next(iter(context.spec.drafting))):
        pulled = context.store.obtain(recipe, make)
    model = ModelDescription(checkpoint.document("config.json"), {})
    drafting = check(context.spec, resolved, model, pulled.folder)
    seal.place({f"{DRAFT_MODEL}/{name}": pulled.folder / name for name in pulled.files}, draft.folder)
    draft.sha256.update({f"{DRAFT_MODEL}/{name}": digest for name, digest in pulled.sha256.items()})
    record = PulledDraftModel(
        uri=sources.public_uri(resolved.uri),
        revision=sources.revision_of(resolved, pulled.sha256),
        cache_bytes_per_token=drafting.cache_bytes_per_token,
    )
    (draft.folder / _RECORD).write_text(record.model_dump_json(indent=1))
    return record


def released(image: Artifact) -> ReleasedDraftModel | None:
    """The draft model in an image, as a manifest lists it; None where no model drafts."""
    if _RECORD not in image.files:
        return None
    record = PulledDraftModel.model_validate(image.document(_RECORD))
    inside = f"{DRAFT_MODEL}/"
    files = {path.removeprefix(inside): file for path, file in image.files.items() if path.startswith(inside)}
    return ReleasedDraftModel(uri=record.uri, revision=record.revision, files=files)


def accept(context: StageContext, image: Artifact) -> None:
    """Compare the files with the lock. A first release writes it.

    Raises:
        SourceError: a file is not what the lock pins; names the key.
    """
    lock, found = lock_of(context.spec.lock), released(image)
    if context.draft_model is not None and found is not None and (lock.exists() or not context.dry):
        with naming(next(iter(context.spec.drafting))):
            digests = {name: file.sha256 for name, file in found.files.items()}
            sources.hold_to_lock(lock, context.draft_model, digests)
