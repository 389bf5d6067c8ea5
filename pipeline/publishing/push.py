"""Pushes a release's image and weights to a container registry, and signs them there.

`slipway release` does so where a registry is configured; this is for another registry, or another key, afterwards. An
image has the same digest in every registry.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from containers.errors import ImageError
from containers.image.base import store_of
from containers.image.blobs import Blob
from containers.image.build import ImageRecord, LayerRecord, folder_layers, push_layers, release_layers
from containers.image.distribution import Registry, parse
from pipeline.errors import PublishError
from pipeline.publishing.attest import StatedRelease, attest
from pipeline.settings import Settings
from pipeline.store.artifacts import require_room
from pipeline.trust import signing_key, trust_of
from registry.manifest import ADAPTERS, DRAFT_MODEL, Manifest
from registry.progress import Progress
from registry.pull import pull, read_metadata


def push(reference: str, registry: str | None, settings: Settings, progress: Progress) -> dict[str, str]:
    """Push and sign the release ``NAME[@ALIAS]``; return the references of its image, its weights and its volume.

    Without a ``registry`` (``HOST/PREFIX``) it is the one that the release was pushed to. What is there is not sent.

    Raises:
        PublishError: the release was not pushed, and no registry is given.
        ImageError: this home lacks a layer of the image, or the registry refuses.
        RegistryError: there is no such release, its signature does not verify, or a gate did not pass.
    """
    trust = trust_of(settings)
    read = read_metadata(reference, None, tracking_uri=settings.tracking_uri, trusted_keys=trust)
    release = StatedRelease(read.manifest, read.files)
    image, name = release.image, release.manifest.name
    if registry is None and not image.pushed:
        raise PublishError(f"{name} version {read.version} was not pushed to a registry: name one, as HOST/PREFIX")
    place = f"{registry.rstrip('/')}/{name}" if registry else image.reference.partition("@")[0]
    host, repository, _ = parse(place)
    with Registry(host) as target:
        missing = [layer for layer in image.layers if not target.has(repository, layer.digest)]
        if missing:
            progress(f"pushing {len(missing)} of {len(image.layers)} layers to {place}")
            _push_layers(target, repository, missing, f"{name}@v{read.version}", release.manifest, settings, progress)
        if target.manifest(repository, image.digest) is None:
            target.put_blob(repository, image.configuration.encode())
            target.put_manifest(repository, _tag(image), image.manifest.encode())
    return attest(release, signing_key(settings), progress, place=place)


def _push_layers(
    target: Registry,
    repository: str,
    layers: Sequence[LayerRecord],
    version: str,
    manifest: Manifest,
    settings: Settings,
    progress: Progress,
) -> None:
    """Push layers: those of the base and the runtime from the home, the others made anew of the release's files."""
    store = store_of(settings.home)
    stored = [layer for layer in layers if store.has(layer.digest, layer.size)]
    blobs = [store.layer(layer.digest, layer.size) for layer in stored]
    lacking = [layer for layer in layers if layer not in stored]
    scratch = settings.home / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="push-", dir=scratch) as temporary:
        made: dict[str, Blob] = {}
        if lacking:
            require_room(settings.home, manifest.size_bytes, settings.disk_floor, f"pushing {manifest.name}")
            folder = Path(temporary) / "release"
            pull(
                version, folder, tracking_uri=settings.tracking_uri, trusted_keys=trust_of(settings), progress=progress
            )
            checkpoint = _checkpoint(folder, Path(temporary) / "checkpoint", manifest)
            known = {folder / name: record.sha256 for name, record in manifest.files.items()}
            beside = [f"{ADAPTERS}/{name}" for name in manifest.adapters] + [DRAFT_MODEL] * bool(manifest.draft_model)
            folders = {place: folder / place for place in beside}
            own = release_layers(checkpoint, _sha256(manifest), folder_layers(folders, known))
            made = {blob.digest: blob for blob in map(store.hashed, own)}
        for layer in lacking:
            if layer.digest not in made:
                raise ImageError(
                    f"the layer `{layer.holds}` of {manifest.name} is not in {settings.home}, where it was released: "
                    "push it from there, or release again"
                )
        push_layers(target, repository, (*blobs, *(made[layer.digest] for layer in lacking)), (), store)


def _checkpoint(release: Path, folder: Path, manifest: Manifest) -> Path:
    """Link a release's model files into a folder of their own."""
    for name in _sha256(manifest):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(release / name, folder / name)
    return folder


def _sha256(manifest: Manifest) -> dict[str, str]:
    """The digests of a release's model files."""
    return {
        name: record.sha256
        for name, record in manifest.files.items()
        if not name.startswith(("release/", f"{ADAPTERS}/", f"{DRAFT_MODEL}/"))
    }


def _tag(image: ImageRecord) -> str:
    """The tag that `containers.image.build` gives an image."""
    return image.model_digest.removeprefix("sha256:")[:12]
