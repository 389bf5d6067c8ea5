"""The stage `adapters`: the LoRA adapters that are served next to the model, each at its pinned revision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pipeline.compatibility.description import ModelDescription
from pipeline.compatibility.lora import modules
from pipeline.errors import naming
from pipeline.planner.sources import describe_folder
from pipeline.settings import Settings
from pipeline.sources import adapter as adapters
from pipeline.sources import source as sources
from pipeline.spec import ModelSpec
from pipeline.stages.code_version import code_version
from pipeline.stages.context import StageContext
from pipeline.stages.pulled_adapters import RECORD, PulledAdapter, PulledAdapters, files_of
from pipeline.stages.stage import Inputs
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe, require_room


def resolve(spec: ModelSpec, settings: Settings) -> dict[str, sources.ResolvedSource]:
    """Find out what the adapters' sources hold, without pulling them.

    Raises:
        SourceError: one can't be reached, holds what is refused, or is not what its lock pins; names the key.
    """
    found = {}
    for name, wanted in spec.serve.adapters.items():
        with naming(f"serve.adapters.{name}"):
            lock = adapters.lock_of(spec.lock, name)
            found[name] = sources.resolve_locked(wanted.uri, wanted.revision, lock, settings, adapters.ADAPTER)
    return found


def check(resolved: Mapping[str, sources.ResolvedSource], model: ModelDescription | None) -> None:
    """Check from configurations and headers, before anything is pulled, that adapters are whole and fit the ``model``.

    Raises:
        SourceError: one can't be read or does not fit; names the key.
    """
    for name, source in resolved.items():
        with naming(f"serve.adapters.{name}"):
            adapters.refuse_misfit(adapters.describe(source), model, source.uri)


def prepare(context: StageContext, _inputs: Inputs) -> StageContext:
    """Resolve the revisions."""
    return replace(context, adapters=resolve(context.spec, context.settings))


def recipe(context: StageContext, inputs: Inputs) -> Recipe:
    """The URIs and contents, and the model that they must fit."""
    wanted = {name: {"uri": each.uri, "content": each.fingerprint} for name, each in context.adapters.items()}
    return Recipe(
        "adapters",
        inputs={"source": inputs["source"].digest},
        parameters={"adapters": wanted},
        code=code_version(__name__),
    )


def make(context: StageContext, inputs: Inputs, draft: ArtifactDraft) -> None:
    """Pull and check the adapters."""
    settings, found = context.settings, {}
    model = describe_folder(inputs["source"].folder).model if context.adapters else None
    for name, resolved in context.adapters.items():
        require_room(settings.home, resolved.bytes, settings.disk_floor, f"{resolved.uri} (the adapter `{name}`)")
        folder = draft.folder / name
        folder.mkdir()
        with naming(f"serve.adapters.{name}"):
            sha256 = sources.pull(resolved, folder, settings.home / "downloads", context.progress)
            described = adapters.describe_folder(folder)
            adapters.refuse_misfit(described, model, resolved.uri)
        draft.sha256.update({f"{name}/{file}": digest for file, digest in sha256.items()})
        found[name] = PulledAdapter(
            uri=sources.public_uri(resolved.uri),
            revision=sources.revision_of(resolved, sha256),
            rank=described.configuration.rank,
            modules=tuple(modules(described.tensors)),
        )
    (draft.folder / RECORD).write_text(PulledAdapters(adapters=found).model_dump_json(indent=1))


def accept(context: StageContext, artifact: Artifact) -> None:
    """Compare the files with each adapter's lock. A first release writes the locks.

    Raises:
        SourceError: a file is not what a lock pins.
    """
    for name, resolved in context.adapters.items():
        lock = adapters.lock_of(context.spec.lock, name)
        if lock.exists() or not context.dry:
            with naming(f"serve.adapters.{name}"):
                sources.hold_to_lock(lock, resolved, files_of(artifact, name))
