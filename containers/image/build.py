"""The image of a release: a base, a runtime shared by every model, and one checkpoint under ``/model``.

No command runs: the checkpoint's files become layers on top of the runtime's, streamed from their folder. Each file is
a layer, the weights before the configuration and the tokenizer, so that changing these transfers only kilobytes. The
last layer is the list by which the runtime's loader knows all of these files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
from docker.models.images import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from containers.errors import ImageError
from containers.image import loading
from containers.image.base import store_of
from containers.image.blobs import Blob, BlobStore
from containers.image.distribution import Registry, Traffic, parse
from containers.image.gpu_compatibility import MODEL_BYTES
from containers.image.layers import FileLayer, Member, plain_files
from containers.image.model_loader import list_of_layers
from containers.image.oci import OciImage
from containers.image.profile import RuntimeProfile
from containers.image.runtime import PORT, Runtime, build_runtime
from containers.image.serving import CHAT_TEMPLATE, DEFAULT, DRAFT_MODEL, ServingConfiguration
from registry.errors import first_problem
from registry.progress import Progress

IMAGE_FILE = "image.json"
RELEASE_REPOSITORY = "slipway"
SERVING = "slipway.serving"
"""The label with the configuration that the image serves, as JSON."""
# Overlay file systems allow 128 layers. The base, the runtime and later additions need some of them.
MOST_MODEL_LAYERS = 100
# Concurrent uploads to a registry. Each has at most a megabyte in memory.
UPLOADS = 4
# Only weights, tokenizer and their configuration go into an image.
_UNWANTED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".py")


class LayerRecord(BaseModel):
    """A layer: its digest, its size in bytes, and its content (``base …``, ``runtime …``, ``model …``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    """The layer's digest."""
    size: int
    """The layer's size in bytes."""
    holds: str
    """The layer's content: `base …`, `runtime …` or `model …`."""


class ImageRecord(BaseModel):
    """The record of an image, kept as evidence (``image.json``).

    ``reference`` identifies it for the engine and never changes: ``REPOSITORY@sha256:…`` if it is in a registry
    (``pushed``), else the engine's image id. ``digest`` is that of its OCI manifest, pushed or not: the same inputs
    give the same digest on any machine. ``image_id`` is the engine's id. Sizes are uncompressed bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    reference: str
    """`REPOSITORY@sha256:…` if it is in a registry, else the engine's image id."""
    digest: str
    """The digest of the OCI manifest."""
    pushed: bool
    """Whether it is in a registry."""
    tag: str
    """The image's tag in the engine."""
    image_id: str
    """The engine's image id."""
    base: str
    """The base image."""
    base_digest: str
    """The digest of the base."""
    pins_digest: str
    """The digest of the runtime's profile, lock and scripts."""
    wheels_digest: str
    """The digest of the runtime's wheels."""
    model_digest: str
    """The digest of the checkpoint."""
    runtime: str
    """The runtime's name."""
    runtime_image_id: str
    """The engine's id of the runtime's image."""
    minimum_cuda: str | None
    """The oldest CUDA that the runtime supports."""
    minimum_driver: str | None
    """The oldest GPU driver that the runtime supports."""
    size_bytes: int
    """Size of all layers."""
    model_bytes: int
    """Size of the checkpoint's layers."""
    port: int
    """The port that the server listens on."""
    user: int
    """The numeric user that the server runs as."""
    labels: Mapping[str, str]
    """The image's labels."""
    layers: tuple[LayerRecord, ...] = ()
    """The layers, from the bottom up."""
    manifest: str
    """The OCI manifest, as text."""
    configuration: str
    """The image configuration, as text."""


def read_image(folder: Path) -> ImageRecord:
    """Read ``image.json`` in ``folder``; ``ImageError`` where it is missing, or is none."""
    path = folder / IMAGE_FILE
    try:
        return parse_image(path.read_bytes(), str(path))
    except OSError as error:
        raise ImageError(f"{path} can't be read: {error.strerror}") from error


def parse_image(data: bytes, where: str) -> ImageRecord:
    """Read what ``image.json`` holds; ``ImageError``, which names the file as ``where``, if it is not valid."""
    try:
        return ImageRecord.model_validate_json(data)
    except ValidationError as error:
        raise ImageError(f"{where}: {first_problem(error)}: release again") from error


def build_image(
    client: docker.DockerClient,
    profile: RuntimeProfile,
    checkpoint: Path,
    *,
    name: str,
    served_name: str,
    model_digest: str,
    home: Path,
    progress: Progress,
    serving: ServingConfiguration = DEFAULT,
    beside: Sequence[FileLayer] = (),
    registry: str | None = None,
    labels: Mapping[str, str] | None = None,
    base: str | None = None,
    sha256: Mapping[str, str] | None = None,
) -> ImageRecord:
    """Assemble the image of the release ``name`` (``demo-awq``) from runtime and checkpoint; push it if wanted.

    ``served_name`` is the model's name in the API, ``serving`` how it is served, with the ``chat_template`` that it
    names. ``registry`` is a repository's prefix (``127.0.0.1:5005/slipway``).
    ``labels`` are added, for instance ``org.opencontainers.image.source``; those of ``org.opencontainers`` become
    annotations too. ``sha256`` has the known digests of the checkpoint's files, by path: a layer whose files are all
    known and that was sent before is not read again.

    Raises:
        ImageError, WheelError, EngineError: each with one line. No incomplete image gets a tag.
    """
    serving = serving.resolved(checkpoint_config(checkpoint), profile)
    _refuse_unwanted(checkpoint)
    runtime = build_runtime(client, profile, home, progress, base=base)
    layers = release_layers(checkpoint, sha256 or {}, beside)
    version = model_digest.removeprefix("sha256:")[:12]
    described = {
        "org.opencontainers.image.title": name,
        "org.opencontainers.image.description": f"{served_name} served by {profile.name}",
        "org.opencontainers.image.version": version,
        "org.opencontainers.image.base.name": runtime.labels["slipway.base.name"],
        "org.opencontainers.image.base.digest": runtime.labels["slipway.base.digest"],
        "slipway.model.digest": model_digest,
        "slipway.model.name": served_name,
        SERVING: serving.document(),
        MODEL_BYTES: str(
            sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors"))
            + sum(layer.size for layer in beside if is_draft_model(_comment(layer)))
        ),
        **(labels or {}),
    }
    progress(f"putting {name} together from {checkpoint}")
    arguments = list(command(profile, served_name, serving))
    placed = place_image(
        client, runtime, layers, {"Cmd": arguments}, name=name, version=version, labels=described, home=home,
        progress=progress, registry=registry,
    )  # fmt: skip
    image = placed.image
    driver, inherited = profile.minimum_driver, runtime.labels
    return ImageRecord(
        reference=placed.reference,
        digest=image.digest,
        pushed=registry is not None,
        tag=placed.tag,
        image_id=placed.image_id,
        base=inherited["slipway.base.name"],
        base_digest=inherited["slipway.base.digest"],
        pins_digest=inherited["slipway.pins.digest"],
        wheels_digest=inherited["slipway.wheels.digest"],
        model_digest=model_digest,
        runtime=profile.name,
        runtime_image_id=runtime.image_id,
        minimum_cuda=driver.cuda if driver else None,
        minimum_driver=driver.driver if driver else None,
        size_bytes=placed.size_bytes,
        model_bytes=sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()),
        port=PORT,
        user=profile.user,
        labels=dict(image.settings["Labels"]),
        layers=tuple(
            LayerRecord(digest=layer.digest, size=layer.size, holds=comment)
            for layer, comment in zip(image.layers, image.comments, strict=True)
        ),
        manifest=image.manifest.decode(),
        configuration=image.config.decode(),
    )


@dataclass(frozen=True)
class Placed:
    """An assembled image: in the engine as ``tag``; ``reference`` and ``digest`` are as in `ImageRecord`.

    ``size_bytes`` is the size of all its layers.
    """

    image: OciImage
    reference: str
    tag: str
    image_id: str
    size_bytes: int


def place_image(
    client: docker.DockerClient,
    runtime: Runtime,
    layers: Sequence[FileLayer],
    changes: Mapping[str, object],
    *,
    name: str,
    version: str,
    labels: Mapping[str, str],
    home: Path,
    progress: Progress,
    registry: str | None = None,
) -> Placed:
    """Add ``layers`` to a runtime, push the image if ``registry`` is given, and load it into the engine.

    ``changes`` replace settings of the runtime. ``labels`` are added; those of ``org.opencontainers`` become
    annotations too. The image is ``REGISTRY/name`` with the tag ``version``.

    Raises:
        ImageError, EngineError: each with one line. No incomplete image gets a tag.
    """
    began = time.monotonic()
    store = store_of(home)
    image: OciImage
    if registry:
        host, repository, _ = parse(f"{registry}/{name}")
        with Registry(host) as target:
            blobs = push_layers(target, repository, runtime.layers, layers, store)
            image = _assembled(runtime, blobs, layers, changes, labels)
            target.put_blob(repository, image.config)
            target.put_manifest(repository, version, image.manifest)
            progress(f"pushed {registry}/{name}:{version}: {_describe(target.traffic)}")
    else:
        image = _assembled(runtime, [store.hashed(layer) for layer in layers], layers, changes, labels)
    tag = f"{RELEASE_REPOSITORY}:{name}-{version}"
    loaded = loading.load(client, image, tag)
    progress(f"{tag} is {image.digest}, assembled in {time.monotonic() - began:.1f} s")
    reference = f"{registry}/{name}@{image.digest}" if registry else str(loaded.id)
    return Placed(image, reference, tag, str(loaded.id), int(loaded.attrs["Size"]))


def release_layers(checkpoint: Path, sha256: Mapping[str, str], beside: Sequence[FileLayer]) -> list[FileLayer]:
    """Return all layers of a release's own: its checkpoint, what is served ``beside`` it, and the list of both."""
    layers = [*model_layers(checkpoint, sha256), *beside]
    return [*layers, list_of_layers(layers)]


def model_layers(checkpoint: Path, sha256: Mapping[str, str]) -> list[FileLayer]:
    """Return the checkpoint's layers: one per file (groups if there are very many), the shards of weights first.

    ``sha256`` has the known digests of its files, by path.
    """
    known = {checkpoint / name: digest for name, digest in sha256.items()}
    members = plain_files(checkpoint, "model")
    shards = [member for member in members if member.name.endswith(".safetensors")]
    rest = [member for member in members if not member.name.endswith(".safetensors")]
    together = -(-len(members) // (MOST_MODEL_LAYERS - 1)) or 1
    groups = [part[start : start + together] for part in (shards, rest) for start in range(0, len(part), together)]
    return [FileLayer(tuple(group), known) for group in groups]


def folder_layers(folders: Mapping[str, Path], sha256: Mapping[Path, str]) -> list[FileLayer]:
    """Return a layer for each folder, by its place in the image; ``sha256`` is what is known of their files."""
    return [FileLayer(tuple(plain_files(path, place.removeprefix("/"))), sha256) for place, path in folders.items()]


def is_draft_model(holds: str) -> bool:
    """Whether a layer is that of the model that drafts tokens, by what it holds (`LayerRecord`)."""
    return holds.startswith(f"{DRAFT_MODEL.removeprefix('/')} ")


def template_layer(chat_template: Path) -> FileLayer:
    """Return the layer of a chat template in place of the model's own."""
    return FileLayer((Member(CHAT_TEMPLATE.removeprefix("/"), chat_template.read_bytes()),), {})


def push_layers(
    registry: Registry, repository: str, shared: tuple[Blob, ...], layers: Sequence[FileLayer], store: BlobStore
) -> list[Blob]:
    """Push the layers to a repository. Those it has are skipped, those that another repository has are mounted.

    A layer with an unknown digest is hashed while it is sent, so that it is read once.

    Returns:
        The ``layers`` with their digests; the ``shared`` ones had them before.
    """

    def push(layer: FileLayer | Blob) -> Blob:
        if isinstance(layer, Blob):
            return _push(registry, repository, layer, store)
        known = store.known(layer)
        if known is not None:
            return _push(registry, repository, known, store)
        sent = store.learn(layer, registry.upload(repository, layer.chunks(), layer.size))
        store.note_push(registry.host, sent.digest, repository)
        return sent

    # A registry hashes each upload: concurrent uploads let it use more than one core.
    with ThreadPoolExecutor(UPLOADS) as pool:
        try:
            return list(pool.map(push, [*shared, *layers]))[len(shared) :]
        except BaseException:  # including Ctrl-C: the threads with uploads must end
            registry.stop()
            pool.shutdown(cancel_futures=True)
            raise


def _describe(traffic: Traffic) -> str:
    return f"{traffic.sent:,} bytes sent, {traffic.skipped:,} already there, {traffic.mounted:,} mounted"


def _push(registry: Registry, repository: str, blob: Blob, store: BlobStore) -> Blob:
    other = store.pushed_to(registry.host, blob.digest)
    if registry.has(repository, blob.digest):
        registry.traffic.add(skipped=blob.size)
    elif other not in {None, repository} and registry.mount(repository, blob.digest, str(other)):
        registry.traffic.add(mounted=blob.size)
    else:
        registry.upload(repository, blob.chunks(), blob.size, blob.digest)
    store.note_push(registry.host, blob.digest, repository)
    return blob


def _assembled(
    runtime: Runtime, blobs: Sequence[Blob], layers: Sequence[FileLayer], changes: Mapping[str, object],
    labels: Mapping[str, str],
) -> OciImage:  # fmt: skip
    settings = {**runtime.image.settings, **changes, "Labels": {**runtime.labels, **labels}}
    comments = (*runtime.comments, *(_comment(layer) for layer in layers))
    annotations = {key: value for key, value in labels.items() if key.startswith("org.opencontainers.")}
    return OciImage(settings, (*runtime.layers, *blobs), comments, annotations)


def _comment(layer: FileLayer) -> str:
    """Describe a layer's content: its folder, its first file, and the number of other files."""
    first, *others = (member.name for member in layer.members)
    folder, _, name = first.partition("/")
    return f"{folder} {name}" + (f" and {len(others)} more" if others else "")


def serving_arguments(
    profile: RuntimeProfile, checkpoint: Path, served_name: str, serving: ServingConfiguration = DEFAULT
) -> tuple[str, ...]:
    """Return the arguments for vLLM of a checkpoint's image.

    Raises:
        ImageError: the folder is not a checkpoint that vLLM can load.
    """
    return command(profile, served_name, serving.resolved(checkpoint_config(checkpoint), profile))


def command(profile: RuntimeProfile, served_name: str, serving: ServingConfiguration) -> tuple[str, ...]:
    """Return the arguments for vLLM with a resolved configuration: the image's and the profile's."""
    return (
        "--model", "/model", "--served-model-name", served_name, "--host", "0.0.0.0", "--port", str(PORT),  # noqa: S104 - its own network
        *serving.engine_arguments(profile), *profile.arguments,
    )  # fmt: skip


def checkpoint_config(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's config.json.

    Raises:
        ImageError: the folder is not a checkpoint that vLLM can load.
    """
    try:
        config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ImageError(f"{checkpoint} has no readable config.json: it is not a checkpoint") from error
    if not any(checkpoint.glob("*.safetensors")):
        raise ImageError(f"{checkpoint} has no *.safetensors: it is not a checkpoint")
    return config


def find(client: docker.DockerClient, record: ImageRecord) -> Image | None:
    """Return the recorded image if the engine has it or can pull it; ``None`` if it must be built again."""
    for reference in (record.image_id, record.reference):
        try:
            return client.images.get(reference)
        except docker.errors.ImageNotFound:
            continue
    if not record.pushed:
        return None
    try:
        return client.images.pull(record.reference)
    except docker.errors.APIError:
        return None


def _refuse_unwanted(checkpoint: Path) -> None:
    unwanted = sorted(path.name for path in checkpoint.rglob("*") if path.suffix in _UNWANTED)
    if unwanted:
        raise ImageError(
            f"{checkpoint} contains {', '.join(unwanted)}: only safetensors, JSON and tokenizer files "
            "may be in an image"
        )
    linked = sorted(path.name for path in checkpoint.rglob("*") if path.is_symlink() and not path.exists())
    if linked:
        raise ImageError(f"{checkpoint} contains broken links: {', '.join(linked)}")
