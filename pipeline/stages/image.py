"""The stage `image`: the checkpoint in its pinned runtime, pushed where a registry is configured."""

from __future__ import annotations

import contextlib
from pathlib import Path

from containers.image import build as images
from containers.image import gpu_compatibility
from containers.image import profile as profiles
from containers.image.layers import FileLayer
from containers.image.serving import ADAPTERS, DRAFT_MODEL, ServingConfiguration
from pipeline.errors import PlanError
from pipeline.planner.facts import read_facts
from pipeline.sources.lock import read_lock
from pipeline.stages import draft_model
from pipeline.stages.code_version import code_version
from pipeline.stages.context import StageContext
from pipeline.stages.pulled_adapters import read_adapters
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
            "serving": serving_of(context, inputs).model_dump(mode="json"),
            "labels": _labels(context, inputs),
            **draft_model.parameters(context),
        },
        code=code_version(__name__),
        pins=profile.pins_digest(),
    )


def make(context: StageContext, inputs: Inputs, draft: ArtifactDraft) -> None:
    """Build the image; one is built at a time in a home."""
    quantized = inputs["quantized"]
    drafting = draft_model.put(context, quantized, draft)
    labels = _labels(context, inputs)
    if drafting is not None and gpu_compatibility.CACHE_BYTES in labels:
        serving = serving_of(context, inputs)
        cache = (serving.context or 0) * drafting.cache_bytes_per_token * serving.cache_bytes // 2
        labels[gpu_compatibility.CACHE_BYTES] = str(int(labels[gpu_compatibility.CACHE_BYTES]) + cache)
    alone = locked(context.settings.home / "image.lock")
    with context.cores(), context.engine() as client, alone, timed(draft.worker_seconds):
        record = images.build_image(
            client,
            profiles.load(context.spec.runtime),
            quantized.folder,
            name=context.release_name,
            served_name=context.spec.model,
            serving=context.serving,
            beside=beside(context, inputs, draft.folder),
            model_digest=quantized.digest,
            home=context.settings.home,
            progress=context.progress,
            registry=context.settings.image_registry,
            sha256=quantized.sha256,
            labels=labels,
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


def beside(context: StageContext, inputs: Inputs, image: Path) -> list[FileLayer]:
    """The layers that are neither of the runtime nor of the checkpoint: adapters, a draft model, a chat template.

    The draft model is in the folder of the ``image``'s artifact.
    """
    pulled, template = inputs["adapters"], context.spec.serve.chat_template
    known = {pulled.folder / path: digest for path, digest in pulled.sha256.items()}
    folders = {f"{ADAPTERS}/{name}": pulled.folder / name for name in read_adapters(pulled)}
    drafting = image / DRAFT_MODEL.removeprefix("/")
    folders |= {DRAFT_MODEL: drafting} if drafting.is_dir() else {}
    return [*images.folder_layers(folders, known), *([] if template is None else [images.template_layer(template)])]


def serving_of(context: StageContext, inputs: Inputs) -> ServingConfiguration:
    """How the image serves the model, every value known."""
    return context.serving.resolved(inputs["quantized"].document("config.json"), profiles.load(context.spec.runtime))


def _labels(context: StageContext, inputs: Inputs) -> dict[str, str]:
    """The model's origin, and the bytes of one request's cache, which `slipway serve` checks against a GPU's memory."""
    source, lock = context.spec.source, read_lock(context.spec.lock)
    uri = f"file:{Path(source.uri).name}" if source.uri.startswith("file:") else source.uri
    labels = {"org.opencontainers.image.source": uri}
    revision = source.revision if lock is None else lock.revision  # the commit, whatever branch the model's file names
    if revision:
        labels["org.opencontainers.image.revision"] = revision
    if context.spec.license:
        labels["org.opencontainers.image.licenses"] = context.spec.license
    config, serving = inputs["quantized"].document("config.json"), serving_of(context, inputs)
    if serving.context is not None:
        with contextlib.suppress(PlanError):  # the planner does not know this architecture, so the size is unknown
            size = read_facts(config).kv_bytes(serving.context, serving.cache_bytes)
            labels[gpu_compatibility.CACHE_BYTES] = str(size)
    return labels
