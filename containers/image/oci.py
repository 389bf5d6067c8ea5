"""An image's configuration and manifest, in canonical JSON, and their digests."""

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
    """An image assembled here: its settings, and its layers from the bottom up.

    ``settings`` is the ``config`` of an OCI image configuration (``Env``, ``Entrypoint``, ``Labels``, …); ``comments``
    describes each layer.
    """

    settings: Mapping[str, Any]
    layers: tuple[Blob, ...]
    comments: tuple[str, ...]
    annotations: Mapping[str, str]

    @property
    def config(self) -> bytes:
        """The image's configuration. Docker uses its digest as the image's id."""
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
        """The image's manifest. Its digest identifies the image in a registry."""
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
        """The digests of the layers' tars, from the bottom up."""
        return [layer.diff_id for layer in self.layers]


def saved(image: OciImage, tag: str, skipped: int = 0) -> Iterator[bytes]:
    """Stream the image for ``docker load``: an OCI layout plus Docker's ``manifest.json``.

    The first ``skipped`` layers are left out: an engine that has them only uses their names (moby pull 18727).
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
    """Return the files of an OCI layout except the layers, by path. ``annotations`` are those of the index's entry."""
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
    """Return the number of layers, from the bottom up, that two images share."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count


def place(digest: str) -> str:
    """Return a blob's path in a layout."""
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"
