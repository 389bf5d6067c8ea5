"""An image as documents: its configuration and its manifest, in canonical JSON, and the digests that follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from containers.image.blobs import Blob
from containers.image.layers import EPOCH_TEXT, member_bytes, padding_after
from registry.digests import canonical_json, digest_of

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"


@dataclass(frozen=True)
class OciImage:
    """An image that was put together here: what it runs with, and its layers from the bottom up.

    ``settings`` is the ``config`` of an OCI image configuration (``Env``, ``Entrypoint``, ``Labels``, …); ``comments``
    says of each layer what it is.
    """

    settings: Mapping[str, Any]
    layers: tuple[Blob, ...]
    comments: tuple[str, ...]
    annotations: Mapping[str, str]

    @property
    def config(self) -> bytes:
        """The image's configuration; its digest is what Docker calls the image's id."""
        history = [{"created": EPOCH_TEXT, "created_by": f"slipway: {comment}"} for comment in self.comments]
        return canonical_json(
            {
                "architecture": "amd64",
                "os": "linux",
                "created": EPOCH_TEXT,
                "config": dict(self.settings),
                "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in self.layers]},
                "history": history,
            }
        )

    @property
    def manifest(self) -> bytes:
        """The image's manifest; its digest is the image's name in a registry."""
        config = self.config
        return canonical_json(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": {"mediaType": CONFIG, "digest": digest_of(config), "size": len(config)},
                "layers": [layer.descriptor for layer in self.layers],
                "annotations": dict(self.annotations),
            }
        )

    @property
    def digest(self) -> str:
        """``sha256:…`` of the manifest."""
        return digest_of(self.manifest)

    @property
    def config_digest(self) -> str:
        """``sha256:…`` of the configuration."""
        return digest_of(self.config)

    @property
    def diff_ids(self) -> list[str]:
        """The layers' own digests, from the bottom up."""
        return [layer.diff_id for layer in self.layers]


def saved(image: OciImage, tag: str, skipped: int = 0) -> Iterator[bytes]:
    """Stream the image as ``docker load`` takes it: an OCI layout with Docker's ``manifest.json`` beside.

    The first ``skipped`` layers are left out: an engine that has them looks at their names alone (moby pull 18727).
    """
    for layer in image.layers[skipped:]:
        yield member_bytes(place(layer.digest), layer.size)
        yield from layer.chunks()
        yield padding_after(layer.size)
    layers = [place(layer.digest) for layer in image.layers]
    loaded = canonical_json([{"Config": place(image.config_digest), "RepoTags": [tag], "Layers": layers}])
    found = documents(image.manifest, image.config, {"io.containerd.image.name": tag})
    for name, data in {**found, "manifest.json": loaded}.items():
        yield member_bytes(name, len(data)) + data + padding_after(len(data))
    yield bytes(1024)


def documents(manifest: bytes, configuration: bytes, annotations: Mapping[str, str] | None = None) -> dict[str, bytes]:
    """What an OCI layout has beside the layers, by its place in it; ``annotations`` are the index's of the image."""
    described: dict[str, Any] = {"mediaType": MANIFEST, "digest": digest_of(manifest), "size": len(manifest)}
    if annotations:
        described["annotations"] = dict(annotations)
    return {
        place(digest_of(configuration)): configuration,
        place(digest_of(manifest)): manifest,
        "index.json": canonical_json({"schemaVersion": 2, "mediaType": INDEX, "manifests": [described]}),
        "oci-layout": canonical_json({"imageLayoutVersion": "1.0.0"}),
    }


def common_start(one: Sequence[str], other: Sequence[str]) -> int:
    """How many layers, from the bottom up, two images share."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count


def place(digest: str) -> str:
    """Where a layout has the blob."""
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"
