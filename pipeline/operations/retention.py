"""What a home keeps of all that its runs made, and what may go: artifacts, and the images that they name.

An artifact stays while it can be reached, through the digests of what each was made of, from a release that the
registry keeps, from what an asset last produced, or from one that is younger than a day: a run may be under way. An
image stays while an artifact that stays names it or a container uses it. Other images are not looked at, as other
homes may share the engine; so an image's artifact goes after the image, and what could not be removed is found again.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import docker
import requests

from containers.engine.engine import connect
from containers.errors import EngineError
from pipeline.settings import Settings
from pipeline.store.artifacts import Store
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
    """What would go: ``kind`` is ``image`` or ``artifact``; ``bytes`` are those that nothing else shares.

    ``images`` are engine's ids: of the image itself, or of those that an artifact names.
    """

    kind: str
    name: str
    why: str
    bytes: int
    place: Place | None = None
    images: tuple[str, ...] = ()


def kept_manifests(tracking_uri: str, going: Collection[retention.Removal]) -> set[str]:
    """Return the digests of the manifests whose versions the registry has, but for the versions that are ``going``.

    Raises:
        TrackingError: The registry can't be reached or read.
    """
    gone = {(item.version.name, item.version.version) for item in going if item.version is not None}
    kept = (version for version in lines(tracking_uri) if (version.name, version.version) not in gone)
    return {version.manifest_digest for version in kept if version.manifest_digest is not None}


def plan(
    settings: Settings, manifests: Collection[str], progress: Progress, *, now: datetime | None = None
) -> list[Leftover]:
    """Return what may go where the releases with these ``manifests`` stay; images first, then artifacts.

    Where no engine answers, images and what names them stay, which ``progress`` is told.

    Raises:
        StoreError: an image's artifact is damaged.
    """
    store = Store(settings.home / "artifacts")
    made = _made(store)
    kept = _reachable(
        made, {*MaterializationIndex(settings), *_kept(made, manifests, (now or datetime.now(UTC)) - _YOUNG)}
    )
    described = _described(store, made)
    gone = [record for place, record in described.items() if place not in kept]
    images: list[Leftover] = []
    staying = {record["image_id"] for record in gone}
    if gone:
        others = [record for place, record in described.items() if place in kept]
        try:
            with contextlib.closing(connect(settings.docker_host, settings.home)) as client:
                images, staying = _images(client, gone, others, progress)
        except (EngineError, *_ENGINE_ERRORS) as error:
            progress(f"images stay, and what names them: {error}")
    return [*images, *_artifacts(store, made, kept, described, staying)]


def remove(leftovers: Sequence[Leftover], settings: Settings, progress: Progress) -> list[Leftover]:
    """Remove what is in the plan; return what was removed, with the bytes that it freed.

    An image that a container or another name needs by now stays, and so does an artifact that somebody is draft.
    """
    store = Store(settings.home / "artifacts")
    images = [item for item in leftovers if item.kind == "image"]
    removed = _removed_images(images, settings, progress) if images else []
    staying = {image for item in images if item not in removed for image in item.images}
    for item in leftovers:
        if item.place is None or not staying.isdisjoint(item.images):
            continue
        freed = _removed(store, item.place)
        if freed is None:
            progress(f"{item.name} stays: somebody is making it")
            continue
        progress(f"removed {item.name}")
        removed.append(replace(item, bytes=freed))
    return removed


def _made(store: Store) -> dict[Place, Mapping[str, Any]]:
    """Every artifact's record. What is half-made lies in a hidden folder, and is none."""
    stages = sorted(path.name for path in store.root.glob("[!.]*") if path.is_dir())
    return {(stage, key): record for stage in stages for key, record in store.records(stage)}


def _kept(made: Mapping[Place, Mapping[str, Any]], manifests: Collection[str], before: datetime) -> Iterator[Place]:
    """The releases that are registered, and whatever is young."""
    for place, record in made.items():
        manifest = record["files"].get("release/manifest.json") if place[0] == "release" else None
        registered = manifest is not None and f"sha256:{manifest['sha256']}" in manifests
        if registered or _created(record) >= before:
            yield place


def _reachable(made: Mapping[Place, Mapping[str, Any]], roots: Collection[Place]) -> set[Place]:
    """The artifacts that the roots were made of, and these in turn.

    Many may hold the same (layers that were not measured do): those count that were made of the same as what was made
    of them.
    """
    holding = defaultdict(list)
    for place, record in made.items():
        holding[record["digest"]].append(place)
    found: set[Place] = set()
    ahead = [place for place in roots if place in made]
    while ahead:
        place = ahead.pop()
        if place in found:
            continue
        found.add(place)
        inputs = made[place]["recipe"]["inputs"]
        ahead += [
            other
            for digest in inputs.values()
            for other in holding[digest]
            if all(inputs.get(name, of) == of for name, of in made[other]["recipe"]["inputs"].items())
        ]
    return found


def _described(store: Store, made: Mapping[Place, Mapping[str, Any]]) -> dict[Place, Mapping[str, Any]]:
    """What each image's artifact says of its image."""
    found = {place: store.find(*place) for place in made if place[0] == "image"}
    return {place: artifact.document("image.json") for place, artifact in found.items() if artifact is not None}


def _images(
    client: docker.DockerClient,
    gone: Sequence[Mapping[str, Any]],
    kept: Sequence[Mapping[str, Any]],
    progress: Progress,
) -> tuple[list[Leftover], set[str]]:
    """Return the images that may go, and the ids of those that were to go and are in use."""
    needed = {image for record in kept for image in (record["image_id"], record["runtime_image_id"])}
    used = {container["ImageID"] for container in client.api.containers(all=True)}
    counted = {layer["digest"] for record in kept for layer in record.get("layers", ())}
    # A release's image has its runtime's layers too: they are the runtime's, which goes after the releases.
    named = {record["image_id"]: (record["tag"], "model ", record) for record in gone}
    named |= {record["runtime_image_id"]: (f"runtime {record['runtime']}", "runtime ", record) for record in gone}
    found, staying = [], set()
    for image, (name, own, record) in named.items():
        if image in needed or not _has(client, image):
            continue
        if image in used:
            progress(f"{name} stays: a container uses it")
            staying.add(image)
            continue
        layers = {
            layer["digest"]: layer["size"] for layer in record.get("layers", ()) if layer["holds"].startswith(own)
        }
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
    made: Mapping[Place, Mapping[str, Any]],
    kept: Collection[Place],
    described: Mapping[Place, Mapping[str, Any]],
    staying: set[str],
) -> list[Leftover]:
    """The artifacts that may go, but for those with an image that stays though no artifact needs it."""
    names: Counter[tuple[int, int]] = Counter()
    found = []
    for place, record in made.items():
        image = described.get(place, {})
        images = tuple(image[name] for name in ("image_id", "runtime_image_id") if name in image)
        if place in kept or not staying.isdisjoint(images):
            continue
        stage, key = place
        why = f"no kept version and no last run was made of it, it is of {_created(record):%Y-%m-%d}"
        size = _freed(_folder(store, place), names)
        found.append(Leftover("artifact", f"{stage} {key[:12]}", why, size, place, images))
    return found


def _removed_images(images: Sequence[Leftover], settings: Settings, progress: Progress) -> list[Leftover]:
    removed = []
    try:
        client = connect(settings.docker_host, settings.home)
    except EngineError as error:
        progress(f"images stay, and what names them: {error}")
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
    """Remove an artifact, in one step for whoever looks; return the bytes freed, None where its lock is held."""
    folder = _folder(store, place)
    with locked_if_free(folder.with_name(f"{folder.name}.lock")) as is_free:
        if not is_free:
            return None
        beside = store.root / ".making" / "-".join(place)
        shutil.rmtree(beside, ignore_errors=True)
        beside.parent.mkdir(exist_ok=True)
        freed = _freed(folder, Counter())
        with contextlib.suppress(FileNotFoundError):  # somebody else removed it
            folder.rename(beside)
        shutil.rmtree(beside, ignore_errors=True)
    return freed


def _freed(folder: Path, names: Counter[tuple[int, int]]) -> int:
    """The bytes of the files whose last name is in the folder, once all that ``names`` counts so far is gone."""
    total = 0
    for stat in (path.stat() for path in folder.rglob("*") if path.is_file()):
        names[stat.st_dev, stat.st_ino] += 1
        total += stat.st_size if names[stat.st_dev, stat.st_ino] == stat.st_nlink else 0
    return total


def _folder(store: Store, place: Place) -> Path:
    stage, key = place
    return store.root / stage / key


def _created(record: Mapping[str, Any]) -> datetime:
    return datetime.fromisoformat(record["created"])
