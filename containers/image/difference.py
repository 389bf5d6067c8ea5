"""Differences between two images: their settings, key by key, and the files of layers that they do not share."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import docker

from containers.errors import ImageError
from containers.image.layers import CHUNK, Stream, pieces, read_file

# More files than this are not listed one by one.
MOST_FILES = 200


@dataclass(frozen=True)
class Entry:
    """A path in a layer, with everything that determines the layer's digest."""

    kind: str
    mode: str
    owner: str
    time: float
    size: int
    target: str
    sha256: str


@dataclass(frozen=True)
class View:
    """An image prepared for comparison: its id, its settings, and each layer's digest and files."""

    image_id: str
    settings: Mapping[str, object]
    layers: tuple[tuple[str, Mapping[str, Entry]], ...]


@dataclass(frozen=True)
class Difference:
    """A difference: ``where`` it is (``settings``, ``layer 3``), ``what`` it is, and both values."""

    where: str
    what: str
    one: str
    other: str


def view(image: str, client: docker.DockerClient | None) -> View:
    """Read an image: a file written by ``docker save`` or Slipway, or an image of the engine by reference.

    Raises:
        ImageError: there is no such file or image.
    """
    if Path(image).is_file():
        return _read(read_file(Path(image)), image)
    if client is None:
        raise ImageError(f"there is no file {image}, and no container engine that could have such an image")
    try:
        return _read(client.images.get(image).save(chunk_size=CHUNK), image)
    except docker.errors.ImageNotFound as error:
        raise ImageError(f"there is no file {image}, and the engine has no such image") from error


def compare(one: View, other: View) -> list[Difference]:
    """Return all differences, settings first; empty for images with the same digest."""
    found = list(_settings(one.settings, other.settings))
    for number in range(max(len(one.layers), len(other.layers))):
        where = f"layer {number + 1}"
        if number >= len(one.layers) or number >= len(other.layers):
            found.append(Difference(where, "the layer", *(_digest(each, number) for each in (one, other))))
            continue
        (left, files), (right, others) = one.layers[number], other.layers[number]
        if left != right:
            inside = list(_files(where, files, others))
            found += inside or [Difference(where, "the order or the headers of its members", left, right)]
    return found


def _settings(one: Mapping[str, object], other: Mapping[str, object], above: str = "") -> Iterator[Difference]:
    for key in sorted(one.keys() | other.keys()):
        left, right = one.get(key), other.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _settings(left, right, f"{above}{key}.")
        elif left != right and f"{above}{key}" != "rootfs.diff_ids":
            yield Difference("settings", f"{above}{key}", json.dumps(left), json.dumps(right))


def _files(where: str, one: Mapping[str, Entry], other: Mapping[str, Entry]) -> Iterator[Difference]:
    for path in sorted(one.keys() | other.keys()):
        left, right = one.get(path), other.get(path)
        if left is None or right is None:
            yield Difference(where, path, *("absent" if each is None else each.kind for each in (left, right)))
            continue
        for name in ("kind", "mode", "owner", "time", "size", "target", "sha256"):
            if getattr(left, name) != getattr(right, name):
                yield Difference(where, f"{path}: {name}", str(getattr(left, name)), str(getattr(right, name)))


def _digest(image: View, number: int) -> str:
    return image.layers[number][0] if number < len(image.layers) else "absent"


def _read(chunks: Iterable[bytes], name: str) -> View:
    """Read an image's archive once, from beginning to end, and hash its layers."""
    documents: dict[str, bytes] = {}
    layers: dict[str, tuple[str, Mapping[str, Entry]]] = {}
    try:
        with tarfile.open(fileobj=BufferedReader(Stream(chunks), CHUNK), mode="r|") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isreg() else None
                if file is None:
                    continue
                start = file.read(tarfile.BLOCKSIZE)
                if start[257:262] == b"ustar":
                    layers[member.name] = _layer(start, pieces(file))
                elif member.size < 1 << 24:
                    documents[member.name] = start + file.read()
        described = json.loads(documents["manifest.json"])[0]
        config = documents[described["Config"]]
        return View(
            f"sha256:{hashlib.sha256(config).hexdigest()}",
            json.loads(config),
            tuple(layers[layer] for layer in described["Layers"]),
        )
    except (tarfile.TarError, KeyError, ValueError, IndexError) as error:
        raise ImageError(f"{name} is not a complete image archive: {type(error).__name__} {error}") from error


def _layer(start: bytes, rest: Iterator[bytes]) -> tuple[str, Mapping[str, Entry]]:
    """List a layer's files, and hash all of it."""
    seen = hashlib.sha256()

    def counted() -> Iterator[bytes]:
        seen.update(start)
        yield start
        for chunk in rest:
            seen.update(chunk)
            yield chunk

    source = counted()
    with tarfile.open(fileobj=BufferedReader(Stream(source), CHUNK), mode="r|") as archive:
        files = {member.name.rstrip("/"): _entry(archive, member) for member in archive}
    for _ in source:  # the bytes after the last member are part of the digest
        pass
    return f"sha256:{seen.hexdigest()}", files


def _entry(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Entry:
    file = archive.extractfile(member) if member.isreg() else None
    digest = hashlib.sha256()
    for chunk in pieces(file) if file else ():
        digest.update(chunk)
    return Entry(
        kind={tarfile.DIRTYPE: "folder", tarfile.SYMTYPE: "link", tarfile.LNKTYPE: "hard link"}.get(
            member.type, "file" if member.isreg() else "special"
        ),
        mode=f"{member.mode:04o}",
        owner=f"{member.uid}:{member.gid} {member.uname}:{member.gname}",
        time=member.mtime,
        size=member.size,
        target=member.linkname,
        sha256=digest.hexdigest() if file else "",
    )
