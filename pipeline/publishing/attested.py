"""Verifies what is in a container registry: its bytes, its signature, and what else was signed about it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256

from containers.image import referrers
from containers.image.distribution import DistributionError, NoAnswerError, Registry
from containers.image.pulled import Descriptor, ImageManifest, read_manifest
from pipeline.errors import PublishError
from pipeline.publishing.attest import CREATED, PREDICATE_TYPE
from pipeline.publishing.places import OCI
from registry.attestation import KINDS, Attachment, AttestedManifest, verify_attached
from registry.digests import digest_of
from registry.errors import Problem, VerificationError
from registry.policy import Trust, policy_of
from registry.progress import Progress

# Every version of Sigstore's bundle begins so.
_BUNDLE = "application/vnd.dev.sigstore.bundle"
_MOST_OF_A_KIND = 50
_READERS = 4


@dataclass(frozen=True)
class VerifiedManifest:
    """A manifest in a registry whose bytes, signature and statements were verified; ``reference`` has its digest."""

    reference: str
    attested: AttestedManifest
    blobs: int
    bytes: int


def verify_in_registry(uri: str, trust: Trust, progress: Progress) -> VerifiedManifest:
    """Verify an image or artifact ``oci://HOST/NAME[:TAG][@sha256:…]``: every byte of it, and what is attached to it.

    Raises:
        VerificationError: It lists what is changed, missing, not signed as the policy asks, or too old.
        DistributionError: the registry can't be reached, does not have it, or sends something else.
    """
    match = OCI.fullmatch(uri)
    if match is None:
        raise PublishError(f"`{uri}` can't be verified: expected oci://HOST/NAME[:TAG][@sha256:…]")
    host, repository, name = match["host"], match["repository"], match["digest"] or match["tag"] or "latest"
    with Registry(host) as registry:
        found = registry.manifest(repository, name)
        if found is None:
            raise DistributionError(f"{host} has no {repository}{'@' if match['digest'] else ':'}{name}")
        digest = digest_of(found[0])
        where = f"{host}/{repository}@{digest}"
        attested = verify_attached_to(registry, repository, digest, trust)
        manifest = read_manifest(found[0], where)
        if not isinstance(manifest, ImageManifest):
            raise PublishError(f"{where} is an index: verify the manifest of a platform")
        blobs = [manifest.config, *manifest.layers]
        progress(f"reading {len(blobs)} blobs of {where}, {sum(blob.size for blob in blobs) / 1e6:.1f} MB")
        with ThreadPoolExecutor(_READERS) as pool:
            problems = list(filter(None, pool.map(lambda blob: _problem(registry, repository, blob), blobs)))
    if problems:
        raise VerificationError(where, problems)
    return VerifiedManifest(where, attested, len(blobs), sum(blob.size for blob in blobs))


def verify_attached_to(registry: Registry, repository: str, digest: str, trust: Trust) -> AttestedManifest:
    """Verify what is attached to a manifest, and read nothing else of it; errors as `verify_in_registry`."""
    attached = list(_attachments(registry, repository, digest))
    return verify_attached(digest, attached, policy_of(trust), f"{registry.host}/{repository}@{digest}")


def _attachments(registry: Registry, repository: str, digest: str) -> Iterator[Attachment]:
    """What is attached; of each kind that is known the latest, since every scan adds its verdicts."""
    kinds: dict[str, list[referrers.Referrer]] = {announced: [] for announced in ("", *KINDS)}
    for each in referrers.referrers(registry, repository, digest):
        if each.kind.startswith(_BUNDLE):
            kinds.get(each.annotations.get(PREDICATE_TYPE, ""), []).append(each)
    for announced, found in kinds.items():
        latest = sorted(found, key=lambda each: each.annotations.get(CREATED, ""), reverse=True)
        for each in latest[:_MOST_OF_A_KIND]:
            try:
                yield Attachment(announced, referrers.document(registry, repository, each))
            except NoAnswerError:
                raise
            except DistributionError as error:
                yield Attachment(announced, b"", lost=str(error))


def _problem(registry: Registry, repository: str, blob: Descriptor) -> Problem | None:
    """What is wrong with a blob; None if it has the digest and the size that its manifest says."""
    total, size = sha256(), 0
    try:
        for chunk in registry.blob(repository, blob.digest, blob.size):
            total.update(chunk)
            size += len(chunk)
    except NoAnswerError:
        raise
    except DistributionError as error:
        return Problem(blob.digest, str(error))
    if f"sha256:{total.hexdigest()}" == blob.digest:
        return None
    return Problem(blob.digest, f"changed: its {size} bytes have the digest sha256:{total.hexdigest()}")
