"""A release's weights in a container registry without the runtime: two manifests over layers that the image has.

- The *model artifact* follows CNCF's ModelPack specification. Its clients pull it.
- The *volume* is an OCI image. A Kubernetes image volume and KServe's ``oci+native://`` mount it: containerd unpacks
  only layers and configurations of images, so a ModelPack manifest can't be mounted there.

Both consist of the image's layers with the model, one file each, with the LoRA adapters and the model that drafts
tokens, and of one more layer, the release's signed documents and its evidence. So no weights are sent to a registry
that has the image. ``/model`` is then a whole release, unless that has adapters or a draft model, which are beside it.
``/models``, where KServe looks, links to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from containers.image.blobs import PLAIN
from containers.image.build import ImageRecord, LayerRecord
from containers.image.distribution import Registry
from containers.image.layers import EPOCH_TEXT, Member, archive
from containers.image.oci import CONFIG, MANIFEST
from registry.digests import canonical_json, digest_of
from registry.manifest import Manifest

MODEL_ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
MODEL_CONFIG = "application/vnd.cncf.model.config.v1+json"
FILE_PATH = "org.cncf.model.filepath"
RELEASE_DIGEST = "slipway.manifest.digest"
"""The annotation with the digest of the release's signed manifest."""
_WEIGHTS, _SETTINGS, _DOCUMENTS = (
    f"application/vnd.cncf.model.{kind}.v1.tar" for kind in ("weight", "weight.config", "doc")
)
# How the layers that both have are described in an image's record: `containers.image.build`.
_SHARED = re.compile(r"(?P<folder>model|adapters|draft_model) (?P<first>.+?)(?P<others> and \d+ more)?")


@dataclass(frozen=True)
class PushedWeights:
    """The digests of the model artifact and of the volume."""

    artifact: str
    volume: str


def push_weights(
    registry: Registry, repository: str, record: ImageRecord, manifest: Manifest, documents: Mapping[str, bytes]
) -> PushedWeights:
    """Write a release's model artifact and volume into the repository that has its image, unless they are there.

    Their tags are the first twelve digits of the release's digest, with ``-weights`` and ``-volume``.

    Args:
        registry: the registry that the image was pushed to.
        repository: the image's repository.
        record: the image.
        manifest: the release's manifest.
        documents: the release's files in its folder ``release/``, by path.

    Raises:
        DistributionError: the registry refuses, or no longer has a layer.
    """
    shared = [layer for layer in record.layers if _SHARED.fullmatch(layer.holds)]
    release = archive(
        [*(Member(f"model/{name}", data) for name, data in documents.items()), Member("models", target="model")]
    )
    tar = b"".join(release.chunks())
    own = LayerRecord(digest=digest_of(tar), size=len(tar), holds="release")
    version = manifest.digest.removeprefix("sha256:")[:12]
    parts = {
        f"{version}-weights": _artifact(shared, own, manifest),
        f"{version}-volume": _volume(shared, own, manifest),
    }
    digests: list[str] = []
    for tag, (config, document) in parts.items():
        digests.append(digest_of(document))
        there = registry.manifest(repository, tag)
        if there is None or digest_of(there[0]) != digests[-1]:
            for blob in (tar, config):
                registry.put_blob(repository, blob)
            registry.put_manifest(repository, tag, document)
    return PushedWeights(*digests)


def _artifact(shared: Sequence[LayerRecord], own: LayerRecord, manifest: Manifest) -> tuple[bytes, bytes]:
    """The model artifact's configuration and manifest, as ModelPack has them."""
    layers = [*shared, own]
    config = canonical_json(
        {
            "descriptor": {
                "createdAt": manifest.created,
                "name": manifest.name,
                "version": manifest.digest,
                "sourceURL": manifest.source.uri,
                "revision": manifest.source.revision,
            },
            "config": {
                "architecture": "transformer",
                "format": "safetensors",
                "quantization": manifest.quantizer.method,
            },
            "modelfs": {"type": "layers", "diffIds": [layer.digest for layer in layers]},
        }
    )
    described = [
        *({**_descriptor(layer, _kind(layer)), **_path(layer)} for layer in shared), _descriptor(own, _DOCUMENTS)
    ]  # fmt: skip
    return config, _manifest(config, MODEL_CONFIG, described, manifest, {"artifactType": MODEL_ARTIFACT})


def _volume(shared: Sequence[LayerRecord], own: LayerRecord, manifest: Manifest) -> tuple[bytes, bytes]:
    """The volume's configuration and manifest, those of an image without a command."""
    layers = [*shared, own]
    config = canonical_json(
        {
            "architecture": "amd64",
            "os": "linux",
            "created": EPOCH_TEXT,
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
        }
    )
    return config, _manifest(config, CONFIG, [_descriptor(layer, PLAIN) for layer in layers], manifest, {})


def _manifest(
    config: bytes, kind: str, layers: Sequence[Mapping[str, Any]], manifest: Manifest, rest: Mapping[str, str]
) -> bytes:
    return canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": kind, "digest": digest_of(config), "size": len(config)},
            "layers": layers,
            "annotations": {
                "org.opencontainers.image.title": manifest.name,
                "org.opencontainers.image.created": manifest.created,
                RELEASE_DIGEST: manifest.digest,
            },
            **rest,
        }
    )


def _descriptor(layer: LayerRecord, kind: str) -> dict[str, Any]:
    return {"mediaType": kind, "digest": layer.digest, "size": layer.size}


def _kind(layer: LayerRecord) -> str:
    return _WEIGHTS if ".safetensors" in layer.holds else _SETTINGS


def _path(layer: LayerRecord) -> Mapping[str, Any]:
    """The path of a layer's file, where it has one alone."""
    found = _SHARED.fullmatch(layer.holds)
    if found is None or found["others"]:
        return {}
    return {"annotations": {FILE_PATH: f"{found['folder']}/{found['first']}"}}
