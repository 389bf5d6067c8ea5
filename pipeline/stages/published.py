"""The stage `quantized` of a source that is quantized already: its files as they are published, checked.

The artifact of `source` is then the 16-bit original, with which the release is compared; without one, it is the
quantized source itself, whose files this artifact shares.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.compatibility.scheme import AS_IS
from pipeline.planner.sources import describe_folder
from pipeline.quantization import checkpoint, published
from pipeline.quantization.quantize import QuantizedNotes
from pipeline.settings import Settings
from pipeline.sources import source as sources
from pipeline.spec import ModelSpec
from pipeline.stages.code_version import code_version
from pipeline.stages.context import StageContext
from pipeline.stages.stage import Inputs, digests
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe, require_room
from pipeline.store.notes import SourceNotes
from registry import seal


def resolve(spec: ModelSpec, settings: Settings) -> sources.ResolvedSource:
    """Find out what the quantized source holds, without pulling it.

    Raises:
        SourceError: it can't be reached, holds what is refused, or is not what the lock pins.
    """
    return sources.resolve_locked(spec.source.uri, spec.source.revision, spec.lock, settings)


def prepare(context: StageContext, _inputs: Inputs) -> StageContext:
    """Resolve the revision, if it is not the source of the stage before."""
    if context.spec.baseline is None:
        return context
    return replace(context, published=resolve(context.spec, context.settings))


def recipe(context: StageContext, inputs: Inputs) -> Recipe:
    """The URI and the content, and the original that it is checked against."""
    resolved = context.published
    return Recipe(
        "quantized",
        inputs=digests(inputs),
        parameters={"method": AS_IS, **({} if resolved is None else _identity(resolved))},
        code=code_version(__name__),
    )


def _identity(resolved: sources.ResolvedSource) -> dict[str, str]:
    return {"uri": resolved.uri, "content": resolved.fingerprint}


def make(context: StageContext, inputs: Inputs, draft: ArtifactDraft) -> None:
    """Pull the files, or link those of the source; check them.

    Raises:
        CheckpointError: listing every problem found.
        UnsupportedModelError: it is not quantized, or in no format that is checked here.
    """
    source = inputs["source"]
    if context.published is None:
        seal.place({name: source.folder / name for name in source.files}, draft.folder)
        draft.sha256.update(source.sha256)
        revision = source.noted(SourceNotes).revision
    else:
        resolved, settings = context.published, context.settings
        require_room(settings.home, resolved.bytes, settings.disk_floor, f"{resolved.uri} (its weights)")
        draft.sha256.update(sources.pull(resolved, draft.folder, settings.home / "downloads", context.progress))
        revision = sources.revision_of(resolved, draft.sha256)
    baseline = None if context.published is None else source.folder
    found = checkpoint.check_published(draft.folder, baseline)
    scheme = published.read(describe_folder(draft.folder).model).scheme
    context.progress(
        f"checked: {scheme.format} as published, {found.layers} layers, {found.bytes / 1e6:.1f} MB, "
        f"{found.bits_per_weight:.2f} bits per weight"
    )
    draft.note(
        QuantizedNotes(
            method=scheme.format,
            backend=scheme.backend,
            parameters=scheme.parameters,
            device=None,
            calibration=None,
            layers=found.layers,
            bytes=found.bytes,
            source_bytes=found.source_bytes,
            bits_per_weight=found.bits_per_weight,
            pins_digest=None,
            revision=revision,
        )
    )


def accept(context: StageContext, quantized: Artifact) -> None:
    """Hold the files to the lock. A first release writes the lock.

    Raises:
        SourceError: a file is not what the lock pins.
    """
    if context.published is not None and (context.spec.lock.exists() or not context.dry):
        sources.hold_to_lock(context.spec.lock, context.published, quantized.sha256)


def with_published(context: StageContext, inputs: Inputs) -> StageContext:
    """Let a stage that takes the checkpoint know the scheme that it follows."""
    if not context.spec.is_published or "quantized" not in inputs:
        return context
    return replace(context, published_scheme=published.scheme_of(inputs["quantized"].document("config.json")))
