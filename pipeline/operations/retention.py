"""Finds and removes unused artifacts of a home, and the images that they name.

An artifact stays if it is an input, directly or not, of a release in the registry, of an asset's last artifact, or of
an artifact that is younger than a day (a run may be using it). An image stays if an artifact that stays names it, or a
container uses it. Images that no artifact names are ignored, because other homes may share the engine. An image is
removed before its artifact, so that an image that could not be removed is found again.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import docker
import requests

from containers.engine.engine import connect
from containers.errors import EngineError
from containers.image.build import ImageRecord, read_image
from pipeline.settings import Settings
from pipeline.store.artifacts import ArtifactRecord, Store
from pipeline.store.materializations import MaterializationIndex, Place
from registry.catalog import lines
from registry.file_locks import locked_if_free
from registry.progress import Progress

if TYPE_CHECKING:
    from registry import retention


_YOUNG = timedelta(days=1)
_ENGINE_ERRORS = (docker.errors.DockerException, requests.RequestException)


@dataclass(frozen=True)
class Leftover:
    """Something unused: ``kind`` is ``image``, ``artifact`` or ``unfinished``; ``bytes`` are those that removal frees.

    ``images`` are the engine's ids of the image itself, or of the images that an artifact names.
    """

    kind: str
    name: str
    why: str
    bytes: int
    place: Place | None = None
    images: tuple[str, ...] = ()


def kept_manifests(tracking_uri: str, going: Collection[retention.Removal]) -> set[str]:
    """Return the manifest digests of the registry's versions, except those that will be removed (``going``).

    Raises:
        TrackingError: The registry can't be reached or read.
    """
    gone = {(item.version.name, item.version.version) for item in going if item.version is not None}
    kept = (version for version in lines(tracking_uri) if (version.name, version.version) not in gone)
    return {version.manifest_digest for version in kept if version.manifest_digest is not None}


def plan(
    settings: Settings, manifests: Collection[str], progress: Progress, *, now: datetime | None = None
) -> list[Leftover]:
    """Return what is unused if the releases with these ``manifests`` stay; images first, then artifacts, then layers.

    The layers are those that a quantizer had finished when it was cut off, unless a run has continued with them.

    If no engine answers, images and the artifacts that name them stay; ``progress`` gets a line about it.

    Raises:
        StoreError, ImageError: an image's artifact is damaged.
    """
    store = Store(settings.home / "artifacts")
    made = _made(store)
    before = (now or datetime.now(UTC)) - _YOUNG
    kept = _reachable(made, {*MaterializationIndex(settings), *_kept(made, manifests, before)})
    described = _described(store, made)
    gone = [record for place, record in described.items() if place not in kept]
    images: list[Leftover] = []
    staying = {record.image_id for record in gone}
    if gone:
        others = [record for place, record in described.items() if place in kept]
        try:
            with contextlib.closing(connect(settings.docker_host, settings.home)) as client:
                images, staying = _images(client, gone, others, progress)
        except (EngineError, *_ENGINE_ERRORS) as error:
            progress(f"images and the artifacts that name them stay: {error}")
    return [*images, *_artifacts(store, made, kept, described, staying), *_unfinished(store, before)]


def remove(leftovers: Sequence[Leftover], settings: Settings, progress: Progress) -> list[Leftover]:
    """Remove the items of a plan; return the removed ones, with the bytes that this freed.

    An image that a container or another tag uses by now stays, and so does an artifact that another process is making.
    """
    store = Store(settings.home / "artifacts")
    images = [item for item in leftovers if item.kind == "image"]
    removed = _removed_images(images, settings, progress) if images else []
    staying = {image for item in images if item not in removed for image in item.images}
    for item in leftovers:
        if item.place is None or not staying.isdisjoint(item.images):
            continue
        freed = store.remove_unfinished(item.place) if item.kind == "unfinished" else _removed(store, item.place)
        if freed is None:
            progress(f"{item.name} stays: another process is making it")
            continue
        progress(f"removed {item.name}")
        removed.append(replace(item, bytes=freed))
    return removed


def _made(store: Store) -> dict[Place, ArtifactRecord]:
    """The record of every complete artifact; incomplete ones are in a hidden folder."""
    stages = sorted(path.name for path in store.root.glob("[!.]*") if path.is_dir())
    return {(stage, key): record for stage in stages for key, record in store.records(stage)}


def _kept(made: Mapping[Place, ArtifactRecord], manifests: Collection[str], before: datetime) -> Iterator[Place]:
    """The artifacts of registered releases, and all that were made after ``before``."""
    for place, record in made.items():
        manifest = record.files.get("release/manifest.json") if place[0] == "release" else None
        registered = manifest is not None and f"sha256:{manifest.sha256}" in manifests
        if registered or _created(record) >= before:
            yield place


def _reachable(made: Mapping[Place, ArtifactRecord], roots: Collection[Place]) -> set[Place]:
    """The roots, their inputs, the inputs of these, and so on.

    Several artifacts may have the same digest. Of these, only those count whose own inputs match the inputs of the
    artifact that was made from them.
    """
    holding = defaultdict(list)
    for place, record in made.items():
        holding[record.digest].append(place)
    found: set[Place] = set()
    ahead = [place for place in roots if place in made]
    while ahead:
        place = ahead.pop()
        if place in found:
            continue
        found.add(place)
        inputs = made[place].recipe.inputs
        ahead += [
            other
            for digest in inputs.values()
            for other in holding[digest]
            if all(inputs.get(name, of) == of for name, of in made[other].recipe.inputs.items())
        ]
    return found


def _described(store: Store, made: Mapping[Place, ArtifactRecord]) -> dict[Place, ImageRecord]:
    """The image record of each image artifact."""
    found = {place: store.find(*place) for place in made if place[0] == "image"}
    return {place: read_image(artifact.folder) for place, artifact in found.items() if artifact is not None}


def _images(
    client: docker.DockerClient,
    gone: Sequence[ImageRecord],
    kept: Sequence[ImageRecord],
    progress: Progress,
) -> tuple[list[Leftover], set[str]]:
    """Return the unused images, and the ids of those that a container still uses."""
    needed = {image for record in kept for image in (record.image_id, record.runtime_image_id)}
    used = {container["ImageID"] for container in client.api.containers(all=True)}
    counted = {layer.digest for record in kept for layer in record.layers}
    # A release's image contains its runtime's layers; these are counted for the runtime, which is removed last.
    named = {record.image_id: (record.tag, "model ", record) for record in gone}
    named |= {record.runtime_image_id: (f"runtime {record.runtime}", "runtime ", record) for record in gone}
    found, staying = [], set()
    for image, (name, own, record) in named.items():
        if image in needed or not _has(client, image):
            continue
        if image in used:
            progress(f"{name} stays: a container uses it")
            staying.add(image)
            continue
        layers = {layer.digest: layer.size for layer in record.layers if layer.holds.startswith(own)}
        size = sum(layers[digest] for digest in layers.keys() - counted)
        counted |= layers.keys()
        found.append(Leftover("image", name, "no artifact that stays names it", size, images=(image,)))
    return found, staying


def _has(client: docker.DockerClient, image: str) -> bool:
    try:
        client.images.get(image)
    except docker.errors.ImageNotFound:
        return False
    return True


def _artifacts(
    store: Store,
    made: Mapping[Place, ArtifactRecord],
    kept: Collection[Place],
    described: Mapping[Place, ImageRecord],
    staying: set[str],
) -> list[Leftover]:
    """The unused artifacts, except those whose image stays because a container uses it."""
    names: Counter[tuple[int, int]] = Counter()
    found = []
    for place, record in made.items():
        image = described.get(place)
        images = () if image is None else (image.image_id, image.runtime_image_id)
        if place in kept or not staying.isdisjoint(images):
            continue
        stage, key = place
        why = f"no kept version and no last run uses it; made on {_created(record):%Y-%m-%d}"
        size = _freed(_folder(store, place), names)
        found.append(Leftover("artifact", f"{stage} {key[:12]}", why, size, place, images))
    return found


def _unfinished(store: Store, before: datetime) -> Iterator[Leftover]:
    """What failed or killed tries have left for a next one that did not come."""
    for (stage, key), folder in store.kept_for_next_try().items():
        last = datetime.fromtimestamp(folder.stat().st_mtime, UTC)
        if last < before:
            why = f"finished parts of a run that was cut off on {last:%Y-%m-%d} and not continued"
            yield Leftover("unfinished", f"{stage} {key[:12]}", why, _freed(folder, Counter()), (stage, key))


def _removed_images(images: Sequence[Leftover], settings: Settings, progress: Progress) -> list[Leftover]:
    removed = []
    try:
        client = connect(settings.docker_host, settings.home)
    except EngineError as error:
        progress(f"images and the artifacts that name them stay: {error}")
        return []
    with contextlib.closing(client):
        for item in images:
            try:
                with contextlib.suppress(docker.errors.ImageNotFound):
                    client.images.remove(item.images[0])
            except _ENGINE_ERRORS as error:
                progress(f"{item.name} stays: {error}")
                continue
            progress(f"removed {item.name}")
            removed.append(item)
    return removed


def _removed(store: Store, place: Place) -> int | None:
    """Remove an artifact atomically; return the bytes freed, or None if another process holds its lock."""
    folder = _folder(store, place)
    with locked_if_free(folder.with_name(f"{folder.name}.lock")) as is_free:
        if not is_free:
            return None
        beside = store.root / ".making" / "-".join(place)
        shutil.rmtree(beside, ignore_errors=True)
        beside.parent.mkdir(exist_ok=True)
        freed = _freed(folder, Counter())
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            folder.rename(beside)
        shutil.rmtree(beside, ignore_errors=True)
    return freed


def _freed(folder: Path, names: Counter[tuple[int, int]]) -> int:
    """The bytes that removing the folder frees; ``names`` counts the hard links that are removed before it."""
    total = 0
    for stat in (path.stat() for path in folder.rglob("*") if path.is_file()):
        names[stat.st_dev, stat.st_ino] += 1
        total += stat.st_size if names[stat.st_dev, stat.st_ino] == stat.st_nlink else 0
    return total


def _folder(store: Store, place: Place) -> Path:
    stage, key = place
    return store.root / stage / key


def _created(record: ArtifactRecord) -> datetime:
    return datetime.fromisoformat(record.created)
