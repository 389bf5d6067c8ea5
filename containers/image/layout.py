"""Writes a release's image as an OCI image layout, so that a scanner need not get gigabytes from the engine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from containers.errors import ImageError
from containers.image.base import store_of
from containers.image.build import ImageRecord
from containers.image.layers import FileLayer, write_chunks
from containers.image.oci import documents, place

# How the layers that are made of a release's own files are described: a checkpoint, adapters, a draft
# model, a chat template, and the list of all of them.
_OWN = ("model ", "adapters ", "draft_model ", "serve ", "etc ")


def has_layers(record: ImageRecord, home: Path) -> bool:
    """Whether the home has all layers of the image, except those made from the release's own files."""
    store = store_of(home)
    shared = (layer for layer in record.layers if not layer.holds.startswith(_OWN))
    return all(store.has(layer.digest, layer.size) for layer in shared)


def write_layout(record: ImageRecord, layers: Sequence[FileLayer], home: Path, folder: Path) -> None:
    """Write the recorded image to ``folder``: layers in the home are linked, those of the release's files are written.

    Args:
        record: the image.
        layers: those that are made from the release's own files.
        home: the state folder with the base's and the runtime's layers.
        folder: made by this function; nothing else may write into it.

    Raises:
        ImageError: a layer is missing, or these files give another one.
    """
    store = store_of(home)
    made = {blob.digest: blob for blob in map(store.hashed, layers)}
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for layer in record.layers:
        path = folder / place(layer.digest)
        if store.has(layer.digest, layer.size):
            _linked(store.path(layer.digest), path)
            continue
        if layer.digest not in made:
            raise ImageError(f"the layer `{layer.holds}` of {record.tag} is missing: release again to rebuild it")
        with path.open("wb") as file:
            written, _ = write_chunks(made[layer.digest].chunks(), file)
        if written != layer.digest:
            raise ImageError(
                f"the layer `{layer.holds}` of {record.tag} has changed: the files now give {written}, "
                f"expected {layer.digest}"
            )
    for name, data in documents(record.manifest.encode(), record.configuration.encode()).items():
        (folder / name).write_bytes(data)


def _linked(blob: Path, path: Path) -> None:
    """Hard-link a blob, or copy it from another file system. Trivy does not follow symbolic links."""
    try:
        os.link(blob, path)
    except OSError:
        shutil.copyfile(blob, path)
