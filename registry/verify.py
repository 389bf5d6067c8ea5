"""Whether a folder is, to the byte, the release that a trusted key signed and whose gates all passed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from registry.errors import ManifestError, Problem, SigningError, VerificationError
from registry.manifest import BOUNDS, DOCUMENTS, MANIFEST, PROVENANCE, SIGNATURE, FileRecord, Manifest
from registry.policy import Policy, Trust, policy_of
from registry.provenance import statement as provenance_of
from registry.signing import Signature, verify_signature
from registry.sigstore_bundle import files_of, is_bundle, open_bundle, payload_of
from registry.walk import entries

_CHUNK = 1 << 20


@dataclass(frozen=True)
class VerificationReport:
    """A folder that is what was signed: its manifest, who signed it, and how much was read."""

    manifest: Manifest
    manifest_digest: str
    keyid: str
    files: int
    bytes: int


def verify(folder: Path, trusted_keys: Trust, *, required_gates: Sequence[str] | None = None) -> VerificationReport:
    """Check a release folder against its signed manifest and the policy, or the keys, that are given.

    Raises:
        VerificationError: It lists every file that is changed, missing, extra, or no plain file; a signature that is
            absent, invalid or by an untrusted key; each gate that blocks, each required one that is absent, and
            evidence that is too old.
    """
    policy = policy_of(trusted_keys, required_gates)
    if not folder.is_dir():
        raise VerificationError(folder, [Problem("release", "there is no such folder")])
    if not any(os.path.lexists(folder / name) for name in (MANIFEST, SIGNATURE)):
        raise VerificationError(folder, [Problem("release", f"this folder is none: it has no {MANIFEST}")])
    found, problems = _walk(folder)
    document, more = _signed_document(folder, policy)
    problems += more
    if document is None:
        raise VerificationError(folder, _ordered(problems))
    manifest, keyid = document.manifest, document.keyid
    if keyid is not None:  # nothing of an unsigned document is believed or shown
        problems += policy.judge(manifest)
    problems += compare_files(folder, manifest.files, found, blamed={problem.what for problem in problems})
    if problems or keyid is None:
        raise VerificationError(folder, _ordered(problems))
    return VerificationReport(manifest, manifest.digest, keyid, len(manifest.files), manifest.size_bytes)


def verify_documents(folder: Path, policy: Policy, expected_digest: str | None) -> VerificationReport:
    """Check what can be checked of a folder without hashing its files: documents, policy, names and sizes.

    Raises:
        VerificationError: As `verify`, and where it is another release than the one with this digest.
    """
    report = check_documents(folder, policy, expected_digest)
    sizes = {name: record.size for name, record in report.manifest.files.items()}
    if plain_files(folder) != sizes:
        raise VerificationError(folder, [Problem("release", "it has other files, or of other sizes, than were signed")])
    return report


def compare_files(
    folder: Path, expected: Mapping[str, FileRecord], found: Mapping[str, int], blamed: set[str] | None = None
) -> list[Problem]:
    """Compare the files ``found`` (path → size) with those ``expected``; what is in ``blamed`` was reported already."""
    problems = compare_sizes(expected, found, blamed)
    to_hash = [name for name, record in expected.items() if found.get(name) == record.size]
    digests = hash_files(folder, to_hash)
    changed = [
        Problem(name, "changed: another sha256 than in the manifest" if digests[name] else "can't be read")
        for name in to_hash
        if digests[name] != expected[name].sha256
    ]
    return [*problems, *changed]


def compare_sizes(
    expected: Mapping[str, FileRecord], found: Mapping[str, int], blamed: set[str] | None = None
) -> list[Problem]:
    """Do the same without reading the files: name those that are extra, missing, or of another size."""
    blamed = blamed or set()
    extra = [Problem(name, "extra: not in the manifest") for name in found if name not in expected]
    missing = [Problem(name, "missing") for name in expected if name not in found and name not in blamed]
    resized = [
        Problem(name, f"changed: {found[name]} bytes, {record.size} in the manifest")
        for name, record in expected.items()
        if name in found and found[name] != record.size
    ]
    return [*extra, *missing, *resized]


def hash_files(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of each file in hexadecimal, read in parallel; empty where a file can't be read."""
    workers = max(1, min(8, os.cpu_count() or 1, len(names)))
    with ThreadPoolExecutor(workers, thread_name_prefix="sha256") as pool:
        return dict(zip(names, pool.map(lambda name: _sha256(folder / name), names), strict=True))


def plain_files(folder: Path) -> dict[str, int]:
    """Return the files that a manifest covers: each one's path within the folder, and its size in bytes.

    Raises:
        VerificationError: The folder holds symlinks or special files; lists all.
    """
    found, problems = _walk(folder)
    if problems:
        raise VerificationError(folder, _ordered(problems))
    return found


def _walk(folder: Path) -> tuple[dict[str, int], list[Problem]]:
    """Find the files that a manifest covers (path → size), and what may not be in a release folder; follow no link."""
    found: dict[str, int] = {}
    problems: list[Problem] = []
    for name, entry in entries(folder, lambda what, why: problems.append(Problem(what, why))):
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISLNK(mode):
            problems.append(Problem(name, f"a symlink to `{Path(entry.path).readlink()}`: a release holds plain files"))
        elif not stat.S_ISREG(mode):
            problems.append(Problem(name, "not a plain file"))
        elif name not in DOCUMENTS:
            found[name] = entry.stat(follow_symlinks=False).st_size
    return found, problems


@dataclass
class _SignedDocument:
    """What the documents of a release say: ``keyid`` is None where no trusted signature covers them."""

    manifest: Manifest
    keyid: str | None


def _signed_document(folder: Path, policy: Policy) -> tuple[_SignedDocument | None, list[Problem]]:
    """Read the manifest and check its signature; one that is readable is returned whatever its signature says."""
    data, problems = read_document(folder, MANIFEST)
    envelope, more = read_document(folder, SIGNATURE)
    problems += more
    manifest = None
    if data is not None:
        try:
            manifest = Manifest.parse(data)
        except ManifestError as error:
            problems.append(Problem(MANIFEST, str(error)))
    keyid = None
    if data is not None and envelope is not None:
        try:
            if is_bundle(envelope):
                signer, statement = open_bundle(envelope, policy.keys, policy.authorities, policy.revoked)
                signed = files_of(statement)
                problems += _uncovered(folder, data, manifest, signed)
                keyid = signer if signed.get(MANIFEST) == hashlib.sha256(data).hexdigest() else None
            else:
                keyid = verify_signature(Signature.parse(envelope), data, policy.keys)
                if os.path.lexists(folder / PROVENANCE):
                    problems.append(Problem(PROVENANCE, "extra: not covered by the signature"))
        except SigningError as error:
            problems.append(Problem(SIGNATURE, str(error)))
    return None if manifest is None else _SignedDocument(manifest, keyid), problems


def _uncovered(folder: Path, data: bytes, manifest: Manifest | None, signed: Mapping[str, str]) -> list[Problem]:
    """Hold manifest, provenance and the list of files to what was signed."""
    if signed.get(MANIFEST) != hashlib.sha256(data).hexdigest():
        return [Problem(SIGNATURE, "it is not over this manifest: one of the two was altered")]
    if manifest is None:
        return []
    provenance, problems = read_document(folder, PROVENANCE)
    if provenance is not None:
        if signed.get(PROVENANCE) != hashlib.sha256(provenance).hexdigest():
            problems.append(Problem(PROVENANCE, "changed: another sha256 than was signed"))
        elif payload_of(provenance) != provenance_of(manifest):
            problems.append(Problem(PROVENANCE, "it says something else than the manifest"))
    expected = {name: record.sha256 for name, record in manifest.files.items()}
    if {name: digest for name, digest in signed.items() if name not in (MANIFEST, PROVENANCE)} != expected:
        problems.append(Problem(SIGNATURE, "it covers other files than the manifest lists"))
    return problems


def read_document(folder: Path, name: str) -> tuple[bytes | None, list[Problem]]:
    """Read a document of a release, bounded and without following a link; None and why where that can't be done."""
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(BOUNDS.bytes + 1)
    except FileNotFoundError:
        return None, [Problem(name, "missing")]
    except OSError as error:
        return None, [Problem(name, f"can't be read: {error.strerror}")]
    if len(data) > BOUNDS.bytes:
        return None, [Problem(name, f"larger than {BOUNDS.bytes} bytes: no manifest is")]
    return data, []


def _sha256(path: Path) -> str:
    """Hash a file in chunks; empty if it can't be read or is not a plain file any more."""
    total = hashlib.sha256()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                total.update(chunk)
    except OSError:
        return ""
    return total.hexdigest()


def _ordered(problems: Sequence[Problem]) -> list[Problem]:
    """Say each thing once, what is wrong with the release as a whole first."""
    unique = {str(problem): problem for problem in problems}
    whole = ("release", *DOCUMENTS)
    return sorted(unique.values(), key=lambda problem: (problem.what not in whole, problem.what))


def check_documents(folder: Path, policy: Policy, expected_digest: str | None) -> VerificationReport:
    """Check manifest, signature and policy, before anything large is fetched.

    Raises:
        VerificationError: A check failed, or the manifest's digest is not ``expected_digest``; lists every problem.
    """
    document, problems = _signed_document(folder, policy)
    if document is not None:
        if document.keyid is not None:
            problems += policy.judge(document.manifest)
        digest = document.manifest.digest
        if digest != expected_digest:
            problems.append(Problem(MANIFEST, f"its digest is {digest}, not {expected_digest} as expected"))
    if document is None or problems or document.keyid is None:
        raise VerificationError(folder, _ordered(problems))
    manifest = document.manifest
    return VerificationReport(manifest, manifest.digest, document.keyid, len(manifest.files), manifest.size_bytes)
