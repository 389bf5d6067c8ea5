"""Images in the engine: loading (only missing layers are sent), lookup, and export."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from io import BufferedReader
from typing import Any

import docker
import requests
import urllib3
from docker.models.images import Image

from containers.errors import ImageError
from containers.image.assembly import explain
from containers.image.blobs import Blob, BlobStore
from containers.image.layers import CHUNK, Stream, pieces
from containers.image.oci import OciImage, common_start, saved


def existing(client: docker.DockerClient, name: str, labels: Mapping[str, str]) -> Image | None:
    """Return the image ``name`` if the engine has it and it has these ``labels``."""
    try:
        image = client.images.get(name)
    except docker.errors.ImageNotFound:
        return None
    return image if labels.items() <= (image.labels or {}).items() else None


def load(client: docker.DockerClient, image: OciImage, tag: str) -> Image:
    """Load an image into the engine as ``tag``; layers that the engine has are not sent.

    Raises:
        ImageError: the engine refuses it, or stored another image.
        EngineError: the engine stopped answering.
    """
    found = _same(client, tag, image)
    if found is not None:
        return found
    present = max((common_start(layers, image.diff_ids) for layers in _layers(client)), default=0)
    if present:
        try:
            _send(client, image, tag, present)
        except ImageError:
            present = 0  # this engine needs all layers (containerd's store), or has lost one
    if not present:
        _send(client, image, tag, 0)
    found = _same(client, tag, image)
    if found is None:
        raise ImageError(f"the engine stored {tag} with another id (`slipway doctor` names the engine)")
    return found


def _same(client: docker.DockerClient, tag: str, image: OciImage) -> Image | None:
    """The image ``tag`` if it is this one. An engine's id is the digest of the configuration or of the manifest."""
    try:
        found = client.images.get(tag)
    except docker.errors.ImageNotFound:
        return None
    return found if found.id in {image.config_digest, image.digest} else None


def _layers(client: docker.DockerClient) -> list[list[str]]:
    """The layers of each image in the engine."""
    found = []
    for summary in client.api.images(all=True):
        try:
            found.append(list(client.images.get(summary["Id"]).attrs["RootFS"]["Layers"] or []))
        except (docker.errors.ImageNotFound, KeyError):
            continue
    return found


def _send(client: docker.DockerClient, image: OciImage, tag: str, skipped: int) -> None:
    try:
        told: Any = client.api.load_image(saved(image, tag, skipped))  # type: ignore[no-untyped-call]
        for line in told:
            if isinstance(line, dict) and "error" in line:
                error = docker.errors.APIError(str(line["error"]), explanation=str(line["error"]))
                raise explain(error, tag)
    except (docker.errors.DockerException, requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise explain(error, tag) from error


def taken_out(client: docker.DockerClient, reference: str, store: BlobStore) -> tuple[dict[str, Any], list[Blob]]:
    """Return the settings and layers of an engine's image; the layers are copied to ``store``.

    Raises:
        ImageError: the engine has no such image.
    """
    try:
        image = client.images.get(reference)
        wanted: list[str] = image.attrs["RootFS"]["Layers"]
        missing = {digest for digest in wanted if not store.path(digest).is_file()}
        if missing:
            _export(image, store)
    except docker.errors.ImageNotFound as error:
        raise ImageError(f"the engine has no image `{reference}` to start from") from error
    absent = [digest for digest in wanted if not store.path(digest).is_file()]
    if absent:
        raise ImageError(f"the engine exported `{reference}` without its layers {', '.join(absent)}")
    layers = [store.layer(digest, store.path(digest).stat().st_size) for digest in wanted]
    return dict(image.attrs["Config"]), layers


def _export(image: Image, store: BlobStore) -> None:
    """Store the layers from ``docker save``, which returns each one as its original tar."""
    with tarfile.open(fileobj=BufferedReader(Stream(image.save(chunk_size=CHUNK)), CHUNK), mode="r|") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isreg() and not member.name.endswith(".json") else None
            if file is not None and member.size > 512:
                store.add(pieces(file))
