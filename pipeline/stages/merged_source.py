"""The stage `source`, also of a model with an adapter: then the artifact is the base with the adapter merged into it.

The base is an artifact of its own, the one of a model without the adapter, so that it is pulled once for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pipeline.compatibility.description import ModelDescription
from pipeline.compatibility.lora import modules
from pipeline.errors import naming
from pipeline.planner.sources import describe, describe_folder
from pipeline.settings import Settings
from pipeline.sources import adapter as adapters
from pipeline.sources import merge as merging
from pipeline.sources import source as sources
from pipeline.spec import ModelSpec
from pipeline.stages import source
from pipeline.stages.code_version import code_version
from pipeline.stages.context import StageContext, prepared
from pipeline.stages.stage import Inputs
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe, require_room
from pipeline.store.notes import MergedNotes, SourceNotes
from pipeline.workers.environments import pins_digest
from registry.manifest import FileRecord, MergedAdapter

_KEY = "source.adapter"


def resolve_adapter(spec: ModelSpec, settings: Settings) -> sources.ResolvedSource | None:
    """Find out what the source of the adapter holds, without pulling it; None where the model has none.

    Raises:
        SourceError: it can't be reached, holds what is refused, or is not what its lock pins; names the key.
    """
    wanted = spec.source.adapter
    if wanted is None:
        return None
    with naming(_KEY):
        lock = adapters.merged_lock_of(spec.lock)
        return sources.resolve_locked(wanted.uri, wanted.revision, lock, settings, adapters.MERGED)


def check(adapter: sources.ResolvedSource | None, model: ModelDescription) -> None:
    """Check from configurations and headers, before weights are pulled, that the adapter is for this ``model``.

    Raises:
        SourceError: it can't be read or does not fit; names the key.
    """
    if adapter is not None:
        with naming(_KEY):
            adapters.refuse_misfit(adapters.describe(adapter, "merged"), model, adapter.uri, "merged")


def prepare(context: StageContext, inputs: Inputs) -> StageContext:
    """Resolve the revisions."""
    return replace(source.prepare(context, inputs), merged_adapter=resolve_adapter(context.spec, context.settings))


def recipe(context: StageContext, _inputs: Inputs) -> Recipe:
    """The base's, and the adapter's URI and content."""
    return recipe_of(prepared(context.source), context.merged_adapter)


def recipe_of(base: sources.ResolvedSource, adapter: sources.ResolvedSource | None) -> Recipe:
    """The recipe of sources that are resolved."""
    plain = source.recipe_of(base)
    if adapter is None:
        return plain
    wanted = {"uri": adapter.uri, "content": adapter.fingerprint}
    return Recipe(
        plain.stage,
        inputs={},
        parameters={**plain.parameters, "adapter": wanted},
        code=code_version(__name__),
        pins=pins_digest(merging.ENVIRONMENT),
    )


def make(context: StageContext, inputs: Inputs, draft: ArtifactDraft) -> None:
    """Pull the files; with an adapter, merge it into them."""
    adapter = context.merged_adapter
    if adapter is None:
        source.make(context, inputs, draft)
        return
    settings, resolved = context.settings, prepared(context.source)
    check(adapter, describe(resolved).model)
    base = context.store.obtain(source.recipe_of(resolved), lambda plain: source.make(context, inputs, plain))
    require_room(settings.home, 2 * base.size_bytes, settings.disk_floor, f"{resolved.uri} (with its adapter merged)")
    folder = draft.scratch / "adapter"
    folder.mkdir()
    with naming(_KEY):
        sha256 = sources.pull(adapter, folder, settings.home / "downloads", context.progress)
        described, model = adapters.describe_folder(folder, "merged"), describe_folder(base.folder).model
        adapters.refuse_misfit(described, model, adapter.uri, "merged")
        with context.cores():
            kept = merging.merge(
                base.folder,
                model,
                folder,
                described,
                draft.folder,
                context.workers(draft),
                draft.scratch,
                context.progress,
            )
    draft.sha256.update({name: base.sha256[name] for name in kept})
    record = MergedAdapter(
        uri=sources.public_uri(adapter.uri),
        revision=sources.revision_of(adapter, sha256),
        rank=described.configuration.rank,
        modules=tuple(modules(described.tensors)),
        files={name: FileRecord(sha256=sha256[name], size=(folder / name).stat().st_size) for name in sha256},
        pins_digest=pins_digest(merging.ENVIRONMENT),
    )
    draft.note(
        SourceNotes(revision=base.noted(SourceNotes).revision, merged=MergedNotes(base=base.files, adapter=record))
    )


def accept(context: StageContext, artifact: Artifact) -> None:
    """Hold the files of both sources to their locks. A first release writes the locks.

    Raises:
        SourceError: a file is not what a lock pins.
    """
    merged = artifact.noted(SourceNotes).merged
    if merged is None:
        source.accept(context, artifact)
        return
    _hold(context, context.spec.lock, prepared(context.source), merged.base)
    with naming(_KEY):
        lock = adapters.merged_lock_of(context.spec.lock)
        _hold(context, lock, prepared(context.merged_adapter), merged.adapter.files)


def _hold(context: StageContext, lock: Path, resolved: sources.ResolvedSource, files: Mapping[str, FileRecord]) -> None:
    if lock.exists() or not context.dry:
        sources.hold_to_lock(lock, resolved, {name: file.sha256 for name, file in files.items()})
