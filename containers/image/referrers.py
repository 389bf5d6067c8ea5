"""Documents attached to a manifest in a container registry, as OCI referrers.

A registry lists what refers to a manifest by its referrers API. One without it has an index under the tag
``sha256-<hex>``, the fallback of the OCI Distribution Specification 1.1, which whoever attaches keeps up to date. No
registry replaces that index only if it is unchanged: it is read, completed and written, then read again, until it lists
the new document. Between that reading and writing another client's new entry can get lost, as the specification says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from containers.image.blobs import WrittenDescriptor
from containers.image.distribution import DOCUMENT, DistributionError, Registry
from containers.image.oci import EMPTY, INDEX, MANIFEST
from registry.bounded_json import DocumentError, read_json
from registry.digests import canonical_json, digest_of

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_TITLE = "org.opencontainers.image.title"
_TRIES = 5
# The largest document that is read.
_MOST_BYTES = 32 << 20


@dataclass(frozen=True)
class Referrer:
    """A manifest that refers to another one: ``kind`` is the type of the document that it attaches."""

    digest: str
    kind: str
    annotations: Mapping[str, str]


@dataclass(frozen=True)
class Attached:
    """A document that is attached: its manifest's digest, and whether it had to be written."""

    digest: str
    is_new: bool


def subject_of(registry: Registry, repository: str, digest: str) -> WrittenDescriptor:
    """Return the descriptor of a manifest, for what is attached to it.

    Raises:
        DistributionError: the registry does not have it.
    """
    found = registry.manifest(repository, digest)
    if found is None:
        raise DistributionError(
            f"{registry.host} has no image {repository}@{digest}: remove it from the engine too and release again, and "
            "it is pushed anew"
        )
    manifest, media_type = found
    return {"mediaType": media_type, "digest": digest, "size": len(manifest)}


def referrers(registry: Registry, repository: str, digest: str) -> list[Referrer]:
    """Return what is attached to a manifest."""
    return [_referrer(entry) for entry in _index(registry, repository, digest)["manifests"]]


def attach(
    registry: Registry,
    repository: str,
    subject: WrittenDescriptor,
    kind: str,
    data: bytes,
    *,
    title: str,
    annotations: Mapping[str, str] | None = None,
) -> Attached:
    """Attach a document to the manifest with the descriptor ``subject``. If it is attached, nothing is written.

    ``title`` is the document's file name, ``annotations`` are those of its manifest.
    """
    empty = b"{}"
    described = {"mediaType": kind, "digest": digest_of(data), "size": len(data), "annotations": {_TITLE: title}}
    manifest = canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": kind,
            "config": {"mediaType": EMPTY, "digest": digest_of(empty), "size": len(empty)},
            "layers": [described],
            "subject": dict(subject),
            **({"annotations": dict(annotations)} if annotations else {}),
        }
    )
    digest, attached_to = digest_of(manifest), subject["digest"]
    if digest in {each.digest for each in referrers(registry, repository, attached_to)}:
        return Attached(digest, is_new=False)
    registry.put_blob(repository, empty)
    registry.put_blob(repository, data)
    if not registry.put_referrer(repository, manifest):
        entry = WrittenDescriptor(mediaType=MANIFEST, digest=digest, size=len(manifest), artifactType=kind)
        if annotations:
            entry["annotations"] = dict(annotations)
        _list_in_index(registry, repository, attached_to, entry)
    return Attached(digest, is_new=True)


def document(registry: Registry, repository: str, referrer: Referrer) -> bytes:
    """Return the document that a referrer attaches, checked against its digest.

    Raises:
        DistributionError: it is missing, has another digest, or the referrer attaches more or less than one.
    """
    where = f"{registry.host}/{repository}@{referrer.digest}"
    found = registry.manifest(repository, referrer.digest)
    if found is None:
        raise DistributionError(f"{where} is listed as attached, and is not there")
    try:
        (layer,) = read_json(found[0], DOCUMENT)["layers"]
        digest, size = str(layer["digest"]), int(layer["size"])
    except (DocumentError, KeyError, TypeError, ValueError) as error:
        raise DistributionError(f"{where} attaches no single document") from error
    if not _DIGEST.fullmatch(digest) or not 0 <= size <= _MOST_BYTES:
        raise DistributionError(f"{where} attaches more than is read")
    data = b"".join(registry.blob(repository, digest, size))
    if digest_of(data) != digest:
        raise DistributionError(f"{where} attaches {digest}, which was changed: its digest is {digest_of(data)}")
    return data


def read_index(data: bytes, host: str) -> dict[str, Any]:
    """Parse an index of what is attached; ``DistributionError``, which names the registry, if it is not valid."""
    try:
        index = read_json(data, DOCUMENT)
    except DocumentError as error:
        raise DistributionError(f"the registry {host} lists what is attached as {error}") from error
    entries = index.get("manifests") if isinstance(index, dict) else None
    if not isinstance(entries, list) or not all(_is_descriptor(entry) for entry in entries):
        raise DistributionError(f"the registry {host} lists what is attached in no index of OCI's")
    return {**index, "manifests": entries}


def _index(registry: Registry, repository: str, digest: str) -> dict[str, Any]:
    """The index of what refers to a manifest, from the API or from the fallback's tag."""
    pages = registry.referrers(repository, digest)
    if pages is not None:
        indexes = [read_index(page, registry.host) for page in pages]
        return {**indexes[0], "manifests": [entry for index in indexes for entry in index["manifests"]]}
    found = registry.manifest(repository, _fallback_tag(digest))
    if found is None:
        return {"schemaVersion": 2, "mediaType": INDEX, "manifests": []}
    return read_index(found[0], registry.host)


def _referrer(entry: Mapping[str, Any]) -> Referrer:
    notes = entry.get("annotations")
    annotations = {str(key): str(value) for key, value in notes.items()} if isinstance(notes, dict) else {}
    return Referrer(entry["digest"], str(entry.get("artifactType", "")), annotations)


def _list_in_index(registry: Registry, repository: str, subject: str, entry: WrittenDescriptor) -> None:
    """Add an entry to the fallback's index, after all others: some verifiers take the last one of a kind."""
    for _ in range(_TRIES):
        index = _index(registry, repository, subject)
        if entry["digest"] in {each["digest"] for each in index["manifests"]}:
            return
        listed = [*index["manifests"], entry]
        registry.put_manifest(repository, _fallback_tag(subject), canonical_json({**index, "manifests": listed}), INDEX)
    raise DistributionError(
        f"{registry.host}/{repository}:{_fallback_tag(subject)} is being written by others: run again"
    )


def _is_descriptor(entry: object) -> bool:
    """Whether an entry of an index has a valid digest."""
    return isinstance(entry, dict) and _DIGEST.fullmatch(str(entry.get("digest"))) is not None


def _fallback_tag(digest: str) -> str:
    return digest.replace(":", "-")
