"""Publishes a release: verified before, never over something else, and not twice."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import PublishError
from pipeline.publishing.attest import ARTIFACT, StatedRelease, attach
from pipeline.publishing.card import BILL, CONFIGURATION, card
from pipeline.publishing.card import NAME as CARD
from pipeline.publishing.places import BESIDE, OciPlace, Place, opened
from pipeline.settings import Settings
from pipeline.store.artifacts import require_room
from pipeline.trust import signing_key_if_any, trust_of
from registry.errors import ManifestError
from registry.manifest import BOUNDS, DOCUMENTS, MANIFEST, Manifest
from registry.progress import Progress
from registry.pull import pull, read_metadata
from registry.version_files import fetch


@dataclass(frozen=True)
class Published:
    """What was written, or in a dry run would be. No files, where the release was there."""

    name: str
    version: str
    place: str
    manifest_digest: str
    files: tuple[str, ...] = ()
    bytes: int = 0
    card: str = ""


def publish(reference: str, uri: str, settings: Settings, progress: Progress, *, dry_run: bool = False) -> Published:
    """Write the release ``NAME[@ALIAS]`` to a place, with a model card.

    Raises:
        PublishError: the place holds something else, or refuses.
        RegistryError: there is no such release, its signature does not verify, or a gate did not pass.
    """
    trust = trust_of(settings)
    read = (BILL, CONFIGURATION)
    release = read_metadata(reference, read, tracking_uri=settings.tracking_uri, trusted_keys=trust)
    manifest = release.manifest
    version = f"{manifest.name}@v{release.version}"
    found = Published(manifest.name, release.version, uri, manifest.digest)
    with opened(uri, settings) as place:
        if _is_there(place, manifest, uri):
            if not dry_run:
                _attest(place, version, settings, progress)
            return found
        text = card(manifest, release.files, uri)
        if dry_run:
            names = (CARD, *sorted({*manifest.files, *DOCUMENTS}))
            return replace(found, files=names, bytes=manifest.size_bytes, card=text)
        scratch = settings.home / "scratch"
        require_room(settings.home, manifest.size_bytes, settings.disk_floor, f"publishing {manifest.name}")
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="publish-", dir=scratch) as temporary:
            folder, beside = Path(temporary) / "release", Path(temporary) / CARD
            pull(version, folder, tracking_uri=settings.tracking_uri, trusted_keys=trust, progress=progress)
            beside.write_text(text)
            names = (*manifest.files, *(name for name in DOCUMENTS if (folder / name).exists()))
            place.write({CARD: beside, **{name: folder / name for name in names}}, progress)
            _attest(place, version, settings, progress)
        return replace(found, files=(CARD, *sorted(names)), bytes=manifest.size_bytes, card=text)


def _attest(place: Place, version: str, settings: Settings, progress: Progress) -> None:
    """Sign what is published in a container registry, and attach what is known of it, where there is a key to sign."""
    if not isinstance(place, OciPlace) or place.digest is None:
        return
    key = signing_key_if_any(settings)
    if key is not None:
        release = read_metadata(version, None, tracking_uri=settings.tracking_uri, trusted_keys=trust_of(settings))
        stated = StatedRelease(release.manifest, release.files)
        new = attach(place.registry, place.repository, place.digest, stated, ARTIFACT, key)
        if new:
            progress(f"attached to {place.registry.host}/{place.repository}@{place.digest}: {', '.join(new)}")


def _is_there(place: Place, manifest: Manifest, uri: str) -> bool:
    """Whether the place holds this release; an error, if it holds anything else."""
    there = set(place.names())
    ours = {*manifest.files, *DOCUMENTS}
    if MANIFEST in there:
        with tempfile.TemporaryDirectory(prefix="slipway-") as folder:
            raw = fetch(place, MANIFEST, Path(folder), BOUNDS.bytes).read_bytes()
        try:
            other = Manifest.parse(raw)
        except ManifestError as error:
            raise PublishError(f"{uri} holds a manifest that is not valid: {error}; nothing was written") from error
        if other.digest != manifest.digest:
            raise PublishError(
                f"{uri} holds another release, {other.name} {other.digest}: nothing was written; choose another place"
            )
        if missing := sorted(manifest.files.keys() - there):
            raise PublishError(f"{uri} lacks files of this release, such as {missing[0]}: remove it and run again")
        return True
    # A card without a release was written by somebody else, unless the rest of an upload that was cut off is there.
    allowed = ours | (BESIDE if there & ours else BESIDE - {CARD})
    if foreign := sorted(there - allowed):
        raise PublishError(
            f"{uri} holds something else, such as {foreign[0]}: nothing was written; choose another place"
        )
    return False
