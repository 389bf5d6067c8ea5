"""The stage `source`: the model's weights at their pinned revision, every file checked."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from pipeline.errors import naming
from pipeline.settings import Settings
from pipeline.sources import source as sources
from pipeline.spec import ModelSpec
from pipeline.stages.code_version import code_version
from pipeline.stages.context import StageContext, prepared
from pipeline.stages.stage import Inputs
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe, require_room
from pipeline.store.notes import SourceNotes


def resolve(spec: ModelSpec, settings: Settings) -> sources.ResolvedSource:
    """Find out what the model's 16-bit source holds, without pulling it; a folder's digests are remembered.

    Raises:
        SourceError: it can't be reached, holds what is refused, or is not what the lock pins.
    """
    with contextlib.nullcontext() if spec.baseline is None else naming("baseline"):
        return sources.resolve_locked(spec.original.uri, spec.original.revision, spec.original_lock, settings)


def prepare(context: StageContext, _inputs: Inputs) -> StageContext:
    """Resolve the revision."""
    return replace(context, source=resolve(context.spec, context.settings))


def recipe(context: StageContext, _inputs: Inputs) -> Recipe:
    """The URI and the content."""
    return recipe_of(prepared(context.source))


def recipe_of(resolved: sources.ResolvedSource) -> Recipe:
    """The recipe of a source that is resolved."""
    parameters = {"uri": resolved.uri, "content": resolved.fingerprint}
    return Recipe("source", inputs={}, parameters=parameters, code=code_version(__name__))


def make(context: StageContext, _inputs: Inputs, draft: ArtifactDraft) -> None:
    """Pull the files."""
    settings, resolved = context.settings, prepared(context.source)
    require_room(settings.home, resolved.bytes, settings.disk_floor, f"{resolved.uri} (its weights)")
    draft.sha256.update(sources.pull(resolved, draft.folder, settings.home / "downloads", context.progress))
    draft.note(SourceNotes(revision=sources.revision_of(resolved, draft.sha256)))


def accept(context: StageContext, source: Artifact) -> None:
    """Hold the files to the lock. A first release writes the lock.

    Raises:
        SourceError: a file is not what the lock pins.
    """
    lock = context.spec.original_lock
    if lock.exists() or not context.dry:
        sources.hold_to_lock(lock, prepared(context.source), source.sha256)
