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

from containers.image.blobs import PLAIN, WrittenDescriptor
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
class Weights:
    """A manifest of a release's weights, with its configuration, its tag, and the one layer that the image has not."""

    tag: str
    config: bytes
    manifest: bytes
    layer: bytes

    @property
    def digest(self) -> str:
        """``sha256:…`` of the manifest."""
        return digest_of(self.manifest)

    def push(self, registry: Registry, repository: str) -> None:
        """Write it into the repository that has the image, unless its tag names it there.

        Raises:
            DistributionError: the registry refuses, or no longer has a layer.
        """
        there = registry.manifest(repository, self.tag)
        if there is None or digest_of(there[0]) != self.digest:
            for blob in (self.layer, self.config):
                registry.put_blob(repository, blob)
            registry.put_manifest(repository, self.tag, self.manifest)


def model_artifact(image: ImageRecord, manifest: Manifest, documents: Mapping[str, bytes]) -> Weights:
    """Return a release's model artifact, whose tag is the first twelve digits of the release's digest and ``-weights``.

    ``documents`` are the release's files in its folder ``release/``, by path.
    """
    shared, own, layer = _layers(image, documents)
    return Weights(f"{_version(manifest)}-weights", *_artifact(shared, own, manifest), layer)


def volume(image: ImageRecord, manifest: Manifest, documents: Mapping[str, bytes]) -> Weights:
    """Return a release's volume, whose tag ends in ``-volume``; arguments as `model_artifact`."""
    shared, own, layer = _layers(image, documents)
    return Weights(f"{_version(manifest)}-volume", *_volume(shared, own, manifest), layer)


def _layers(image: ImageRecord, documents: Mapping[str, bytes]) -> tuple[list[LayerRecord], LayerRecord, bytes]:
    """The image's layers that both have, and the layer of the documents with its content."""
    members = [Member(f"model/{name}", data) for name, data in documents.items()]
    tar = b"".join(archive([*members, Member("models", target="model")]).chunks())
    shared = [layer for layer in image.layers if _SHARED.fullmatch(layer.holds)]
    return shared, LayerRecord(digest=digest_of(tar), size=len(tar), holds="release"), tar


def _version(manifest: Manifest) -> str:
    return manifest.digest.removeprefix("sha256:")[:12]


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
    config: bytes, kind: str, layers: Sequence[Mapping[str, object]], manifest: Manifest, rest: Mapping[str, str]
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


def _descriptor(layer: LayerRecord, kind: str) -> WrittenDescriptor:
    return {"mediaType": kind, "digest": layer.digest, "size": layer.size}


def _kind(layer: LayerRecord) -> str:
    """A layer of several files, an adapter or a draft model, has weights among them."""
    found = _SHARED.fullmatch(layer.holds)
    several = found is not None and found["others"] is not None
    return _WEIGHTS if several or layer.holds.endswith(".safetensors") else _SETTINGS


def _path(layer: LayerRecord) -> Mapping[str, object]:
    """The path of a layer's file, where it has one alone."""
    found = _SHARED.fullmatch(layer.holds)
    if found is None or found["others"]:
        return {}
    return {"annotations": {FILE_PATH: f"{found['folder']}/{found['first']}"}}
