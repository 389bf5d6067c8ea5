"""A release's image as a folder: the OCI image layout, which a scanner reads without asking an engine for gigabytes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from containers.errors import ImageError
from containers.image.base import store_of
from containers.image.build import ImageRecord, model_layers
from containers.image.layers import write_chunks
from containers.image.oci import documents, place


def has_layers(record: ImageRecord, home: Path) -> bool:
    """Whether the home keeps every layer of the image that is not the checkpoint's."""
    store = store_of(home)
    shared = (layer for layer in record.layers if not layer.holds.startswith("model "))
    return all(store.has(layer.digest, layer.size) for layer in shared)


def write_layout(record: ImageRecord, checkpoint: Path, sha256: Mapping[str, str], home: Path, folder: Path) -> None:
    """Lay the recorded image out in ``folder``: layers that the home keeps are linked, the checkpoint's are written.

    Args:
        record: the image.
        checkpoint: the files that it was made of.
        sha256: what is known of them, by their path in ``checkpoint``.
        home: the state folder with the base's and the runtime's layers.
        folder: made here; nobody else writes into it.

    Raises:
        ImageError: a layer is neither kept nor made of the checkpoint.
    """
    store = store_of(home)
    made = {blob.digest: blob for blob in map(store.hashed, model_layers(checkpoint, sha256))}
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for layer in record.layers:
        path = folder / place(layer.digest)
        if store.has(layer.digest, layer.size):
            _linked(store.path(layer.digest), path)
            continue
        if layer.digest not in made:
            raise ImageError(f"the layer `{layer.holds}` of {record.tag} is gone: release again, and it is made anew")
        with path.open("wb") as file:
            written, _ = write_chunks(made[layer.digest].chunks(), file)
        if written != layer.digest:
            raise ImageError(f"the layer `{layer.holds}` of {record.tag} has changed: it was {layer.digest}")
    for name, data in documents(record.manifest.encode(), record.configuration.encode()).items():
        (folder / name).write_bytes(data)


def _linked(blob: Path, path: Path) -> None:
    """Give a blob a second name, or a copy on another file system; Trivy follows no symbolic link."""
    try:
        os.link(blob, path)
    except OSError:
        shutil.copyfile(blob, path)
