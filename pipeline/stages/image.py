"""The stage `image`: the checkpoint in its pinned runtime, pushed where a registry is configured."""

from __future__ import annotations

import contextlib
from pathlib import Path

from containers.image import build as images
from containers.image import gpu_compatibility
from containers.image import profile as profiles
from containers.image.serving import ServingConfiguration
from pipeline.errors import PlanError
from pipeline.planner.facts import read_facts
from pipeline.sources.lock import read_lock
from pipeline.stages.code_version import code_version
from pipeline.stages.context import StageContext
from pipeline.stages.stage import Inputs, digests
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe, timed
from registry.file_locks import locked


def recipe(context: StageContext, inputs: Inputs) -> Recipe:
    """The checkpoint, the runtime with its pins, and the image's name, labels and registry."""
    profile = profiles.load(context.spec.runtime)
    return Recipe(
        "image",
        inputs=digests(inputs),
        parameters={
            "name": context.release_name,
            "runtime": profile.name,
            "registry": context.settings.image_registry,
            "serving": _serving(context, inputs["quantized"]).model_dump(mode="json"),
            "labels": _labels(context, inputs["quantized"]),
        },
        code=code_version(__name__),
        pins=profile.pins_digest(),
    )


def make(context: StageContext, inputs: Inputs, draft: ArtifactDraft) -> None:
    """Build the image; one is built at a time in a home."""
    quantized = inputs["quantized"]
    alone = locked(context.settings.home / "image.lock")
    with context.cores(), context.engine() as client, alone, timed(draft.worker_seconds):
        record = images.build_image(
            client,
            profiles.load(context.spec.runtime),
            quantized.folder,
            name=context.release_name,
            served_name=context.spec.model,
            serving=context.serving,
            chat_template=context.spec.serve.chat_template,
            model_digest=quantized.digest,
            home=context.settings.home,
            progress=context.progress,
            registry=context.settings.image_registry,
            sha256=quantized.sha256,
            labels=_labels(context, quantized),
        )
    (draft.folder / images.IMAGE_FILE).write_text(record.model_dump_json(indent=1))


def stale(context: StageContext, image: Artifact) -> str | None:
    """Say so where the engine or the home no longer has the image."""
    if context.has_image(record_of(image)):
        return None
    return "the engine or the home has lost layers of this image: building it again"


def record_of(image: Artifact) -> images.ImageRecord:
    """Read what was written about an image when it was built."""
    return images.read_image(image.folder)


def _labels(context: StageContext, quantized: Artifact) -> dict[str, str]:
    """The model's origin, and the bytes of one request's cache, which `slipway serve` checks against a GPU's memory."""
    source, lock = context.spec.source, read_lock(context.spec.lock)
    uri = f"file:{Path(source.uri).name}" if source.uri.startswith("file:") else source.uri
    labels = {"org.opencontainers.image.source": uri}
    revision = source.revision if lock is None else lock.revision  # the commit, whatever branch the model's file names
    if revision:
        labels["org.opencontainers.image.revision"] = revision
    if context.spec.license:
        labels["org.opencontainers.image.licenses"] = context.spec.license
    config = quantized.document("config.json")
    serving = _serving(context, quantized)
    if serving.context is not None:
        with contextlib.suppress(PlanError):  # the planner does not know this architecture, so the size is unknown
            size = read_facts(config).kv_bytes(serving.context, serving.cache_bytes)
            labels[gpu_compatibility.CACHE_BYTES] = str(size)
    return labels


def _serving(context: StageContext, quantized: Artifact) -> ServingConfiguration:
    return context.serving.resolved(quantized.document("config.json"), profiles.load(context.spec.runtime))
