"""Whether what MLflow keeps of a version is, to the byte, the release that its tag names and a trusted key signed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from registry.backend import MANIFEST_TAG, Version
from registry.errors import Problem, PullError, VerificationError
from registry.manifest import BOUNDS, DOCUMENTS, MANIFEST, PROVENANCE, SIGNATURE, Manifest
from registry.policy import Policy, Trust, policy_of
from registry.verify import VerificationReport, check_documents
from registry.version_files import Artifacts, fetch, open_artifacts, sha256

_READERS = 4


def verify_stored(
    version: Version, tracking_uri: str, trusted_keys: Trust, *, required_gates: Sequence[str] | None = None
) -> Manifest:
    """Read a registered version back, and hold all of it to its signed manifest, its name and its gates.

    Raises:
        PullError: Slipway did not register it, it is of another line, or a file is missing or extra.
        VerificationError: Its documents or files are not what was signed, or not what the policy asks for.
        TrackingError: It can't be read.
    """
    policy = policy_of(trusted_keys, required_gates)
    with (
        open_version(version, tracking_uri) as stored,
        naming_version(version),
        tempfile.TemporaryDirectory() as folder,
    ):
        manifest = fetch_documents(stored, Path(folder), version, policy).manifest
        problems = differences(stored, {name: record.sha256 for name, record in manifest.files.items()})
        if problems:
            raise VerificationError(folder, problems)
        return manifest


def differences(stored: Artifacts, expected: Mapping[str, str]) -> list[Problem]:
    """Name each stored file whose SHA-256 is not the expected one, in hexadecimal; all are read, some at once."""
    with ThreadPoolExecutor(_READERS, thread_name_prefix="sha256") as pool:
        found = pool.map(lambda name: sha256(stored, name), expected)
        return [
            Problem(name, "changed: another sha256 than in the manifest" if digest else "changed: can't be read")
            for name, digest in zip(expected, found, strict=True)
            if digest != expected[name]
        ]


def fetch_documents(stored: Artifacts, folder: Path, version: Version, policy: Policy) -> VerificationReport:
    """Fetch manifest, signature and provenance into ``folder``, and check them against the policy and the registry.

    Raises:
        PullError: The version has no signed manifest, is of another name, or holds other files than were signed.
        VerificationError: The documents fail a check; lists every problem.
        TrackingError: The version's files can't be read.
    """
    if version.manifest_digest is None:
        raise PullError(
            f"version {version.version} of `{version.name}` was not registered by Slipway: it has no signed manifest"
        )
    listed = set(stored.names())
    for document in DOCUMENTS:
        if document in listed:
            fetch(stored, document, folder, BOUNDS.bytes)
        elif document != PROVENANCE:
            raise PullError(
                f"the registered version of `{version.name}` has no `{document}`: it is not a signed release"
            )
    report = check_documents(folder, policy, version.tags[MANIFEST_TAG])
    manifest = report.manifest
    if manifest.name != version.name:
        raise PullError(f"the version registered as `{version.name}` holds the release `{manifest.name}`")
    wanted = manifest.files.keys() | {MANIFEST, SIGNATURE} | ({PROVENANCE} & listed)  # which was held to the signature
    if listed != wanted:
        differing = [f"`{item}` is extra" for item in sorted(listed - wanted)]
        differing += [f"`{item}` is missing" for item in sorted(wanted - listed)]
        raise PullError(f"the registered version of `{version.name}` is not what was signed: {'; '.join(differing)}")
    return report


@contextmanager
def open_version(version: Version, tracking_uri: str) -> Iterator[Artifacts]:
    """Open the version's files."""
    with open_artifacts(version.location, tracking_uri) as stored:
        yield stored


@contextmanager
def naming_version(version: Version) -> Iterator[None]:
    """Let a failed verification name the version, not the folder that it was fetched into.

    Raises:
        VerificationError: The one that was raised in the block, with that name.
    """
    try:
        yield
    except VerificationError as error:
        raise VerificationError(f"{version.name} version {version.version}", error.problems) from error
