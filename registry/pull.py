"""Pull: from an alias to a folder that an engine loads, verified before it appears under its name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from registry.backend import MANIFEST_TAG, Version
from registry.cache import Cache
from registry.destination import discard, folder_beside, is_empty, take_place
from registry.digests import digest_of
from registry.download import ByteCount, download
from registry.errors import ArgumentError, ManifestError, Problem, PullError, TrackingError, VerificationError
from registry.file_systems import set_mode, sync_folder
from registry.manifest import BOUNDS, DOCUMENTS, MANIFEST, FileRecord, Manifest
from registry.policy import Policy, Trust, policy_of
from registry.progress import Progress, silent
from registry.resolve import CHAMPION, resolve
from registry.stored import fetch_documents, naming_version, open_version
from registry.suggestions import suggestion
from registry.verify import VerificationReport, verify, verify_documents
from registry.version_files import Artifacts, fetch

CONNECTIONS = 8


@dataclass(frozen=True)
class Pulled:
    """A verified release on disk; ``already_there`` where the destination held it before.

    ``fetched_bytes`` is what was moved; the rest was there, in the destination, the cache, or left by a killed pull.
    """

    name: str
    version: str
    alias: str
    folder: Path
    already_there: bool
    report: VerificationReport
    fetched_bytes: int = 0

    @property
    def manifest(self) -> Manifest:
        """What the release says of itself."""
        return self.report.manifest


def pull(
    reference: str,
    destination: Path,
    *,
    tracking_uri: str,
    trusted_keys: Trust,
    required_gates: Sequence[str] | None = None,
    cache: Path | None = None,
    replace: bool = False,
    variant: str | None = None,
    progress: Progress = silent,
) -> Pulled:
    """Fetch the release that ``NAME@ALIAS`` names (``NAME`` alone: its champion) into the new folder ``destination``.

    ``NAME@v3`` names version 3, whatever the aliases say. Everything is fetched beside the destination, hashed while it
    streams and held against the signed manifest, and renamed. Whatever fails or dies before that leaves the destination
    as it was, and what was fetched for the next try. A destination that holds this very release is left alone.

    Args:
        reference: ``NAME``, ``NAME@ALIAS`` or ``NAME@vNUMBER``.
        destination: A folder that is not there, or empty.
        tracking_uri: Where MLflow is.
        trusted_keys: The keys whose signatures count, or a `Policy`.
        required_gates: The gates that must be there; the policy's where not given.
        cache: A folder, on the destination's file system, that keeps files for other pulls; they are linked.
        replace: Whether a destination that holds another release gives way to this one, in one step, once it is whole.
            Whether it already is this one is then checked without hashing files (`registry.verify.verify_documents`).
        variant: A serving variant that the release must list: one that does not is refused before its weights are
            fetched.
        progress: Told what is being done.

    Raises:
        VariantError: The release does not list the variant.
        NotFoundError: No such release line, alias or version.
        PullError: The destination is taken, or the registry's entry is of another release than its files.
        DiskError: Nothing can be written there now.
        VerificationError: What was fetched is not what was signed, or not what the policy asks for.
        TrackingError: The registry can't be reached or read.
    """
    policy = policy_of(trusted_keys, required_gates)
    name, alias = _parsed(reference)
    destination = Path(os.path.abspath(destination))  # noqa: PTH100 - keeps a symlink in the path as it was given
    version = resolve(name, alias, tracking_uri, policy, cache)
    former = None
    if os.path.lexists(destination) and not is_empty(destination):
        if not replace:
            report = _verified_destination(destination, version, policy)
            report.manifest.configuration(variant)
            return Pulled(name, version.version, alias, destination, True, report)
        former = _previous_release(destination)
        with suppress(VerificationError):  # another release, or one that is no more what was signed: fetched below
            report = verify_documents(destination, policy, version.manifest_digest)
            report.manifest.configuration(variant)
            return Pulled(name, version.version, alias, destination, True, report)
    digest = version.manifest_digest or ""
    progress(f"{name}@{alias} is version {version.version}, {digest}")
    with open_version(version, tracking_uri) as stored, folder_beside(destination, digest, progress) as part:
        if os.path.lexists(destination) and not replace and not is_empty(destination):  # another pull was first
            report = _verified_destination(destination, version, policy)
            report.manifest.configuration(variant)
            return Pulled(name, version.version, alias, destination, True, report)
        have = Cache.beside(cache, destination, former)
        report, moved = _fetched(stored, part, version, policy, have, variant, progress)
        take_place(part, destination, replace=replace)
    return Pulled(name, version.version, alias, destination, False, report, moved.bytes)


def pull_from(
    stored: Artifacts,
    place: str,
    destination: Path,
    *,
    trusted_keys: Trust,
    expected: str | None = None,
    progress: Progress = silent,
) -> Pulled:
    """Fetch the release whose files are ``stored`` at a ``place`` outside of the registry, as `pull` does.

    No registry says which release it is: the signature alone does, or what was signed about the place, which
    ``expected`` the release with this manifest's digest.

    Raises:
        PullError, VerificationError, TrackingError: As `pull`; ``destination`` is as it was.
    """
    policy = policy_of(trusted_keys)
    destination = Path(os.path.abspath(destination))  # noqa: PTH100 - as above
    version = _version_at(stored, place)
    digest = version.manifest_digest or ""
    if expected not in {None, digest}:
        raise PullError(f"{place} holds the release {digest}, and was signed as {expected}")
    if os.path.lexists(destination) and not is_empty(destination):
        report = _verified_destination(destination, version, policy)
        return Pulled(version.name, place, "", destination, True, report)
    progress(f"{place} is {version.name}, {digest}")
    with folder_beside(destination, digest, progress) as part:
        have = Cache.beside(None, destination, None)
        report, moved = _fetched(stored, part, version, policy, have, None, progress)
        take_place(part, destination, replace=False)
    return Pulled(version.name, place, "", destination, False, report, moved.bytes)


def fetch_file(reference: str, name: str, target: Path, *, tracking_uri: str, trusted_keys: Trust) -> None:
    """Write one file of the release that ``NAME@ALIAS`` names to ``target``, held against the signed manifest.

    Raises:
        PullError, VerificationError, TrackingError: As `pull`; ``target`` is as it was.
    """
    policy = policy_of(trusted_keys)
    version = resolve(*_parsed(reference), tracking_uri, policy)
    target = target.absolute()
    digest = version.manifest_digest or ""
    with open_version(version, tracking_uri) as stored, folder_beside(target, digest, silent) as part:
        try:
            with naming_version(version):
                manifest = fetch_documents(stored, part, version, policy).manifest
                if name not in manifest.files:
                    raise PullError(f"the release has no file `{name}`{suggestion(name, sorted(manifest.files))}")
                download(name, part / name, manifest.files[name], partial(stored.open, name), ByteCount())
            (part / name).replace(target)
        finally:
            discard(part)


@dataclass(frozen=True)
class ReleaseMetadata:
    """A release without its weights: its signed manifest, and some of its files' bytes by path."""

    version: str
    manifest: Manifest
    files: Mapping[str, bytes]


def read_metadata(
    reference: str, names: Collection[str] | None, *, tracking_uri: str, trusted_keys: Trust
) -> ReleaseMetadata:
    """Read the manifest of the release that ``NAME@ALIAS`` names, and those of ``names`` that it has, all verified.

    Without ``names``, all files of its folder ``release/`` are read, the signed documents too.

    Raises:
        PullError, VerificationError, TrackingError: As `pull`.
    """
    policy = policy_of(trusted_keys)
    version = resolve(*_parsed(reference), tracking_uri, policy)
    with (
        open_version(version, tracking_uri) as stored,
        TemporaryDirectory(prefix="slipway-") as folder,
        naming_version(version),
    ):
        part = Path(folder)
        manifest = fetch_documents(stored, part, version, policy).manifest
        wanted = names if names is not None else [name for name in manifest.files if name.startswith("release/")]
        files = {}
        for name in sorted(set(wanted) & manifest.files.keys()):
            download(name, part / name, manifest.files[name], partial(stored.open, name), ByteCount())
            files[name] = (part / name).read_bytes()
        if names is None:
            files |= {name: (part / name).read_bytes() for name in DOCUMENTS if (part / name).exists()}
    return ReleaseMetadata(version.version, manifest, files)


def _parsed(reference: str) -> tuple[str, str]:
    name, at, alias = reference.partition("@")
    if not name or (at and not alias) or "@" in alias or set(name + alias) & set("/\\:'\"` ") or name.startswith("."):
        raise ArgumentError(f"`{reference}` names no release: write NAME or NAME@ALIAS, as in `demo-awq@champion`")
    return name, alias or CHAMPION


def _version_at(stored: Artifacts, place: str) -> Version:
    """Describe what a place claims to hold; nothing of it is believed before its signature is checked."""
    if MANIFEST not in stored.names():
        raise PullError(f"{place} holds no release: it has no {MANIFEST}")
    with TemporaryDirectory(prefix="slipway-") as folder:
        raw = fetch(stored, MANIFEST, Path(folder), BOUNDS.bytes).read_bytes()
    try:
        claimed = Manifest.parse(raw)
    except ManifestError as error:
        raise PullError(f"{place} holds a manifest that is not valid: {error}") from error
    tags = {MANIFEST_TAG: digest_of(raw)}
    return Version(claimed.name, place, (), tags, place, datetime.now(UTC))


def _verified_destination(destination: Path, version: Version, policy: Policy) -> VerificationReport:
    """Accept a destination that is this release to the byte; refuse every other."""
    advice = "give another destination, or remove it"
    try:
        report = verify(destination, policy)
    except VerificationError as error:
        raise PullError(f"`{destination}` exists and is not this release ({error.problems[0]}): {advice}") from error
    if report.manifest_digest != version.manifest_digest:
        raise PullError(f"`{destination}` exists and holds another release, {report.manifest_digest}: {advice}")
    return report


def _previous_release(destination: Path) -> Manifest:
    """Return the manifest of the release that is to be replaced; refuse a folder that is none."""
    try:
        return Manifest.parse((destination / MANIFEST).read_bytes())
    except (OSError, ManifestError) as error:
        raise ArgumentError(
            f"`{destination}` exists and is not a release: give another destination, or remove it"
        ) from error


def _fetched(
    stored: Artifacts,
    part: Path,
    version: Version,
    policy: Policy,
    have: Cache,
    variant: str | None,
    progress: Progress,
) -> tuple[VerificationReport, ByteCount]:
    """Put the release together in ``part``, every byte held against the manifest; throw it away where one differs.

    Where it is the documents that differ, they alone go: what a killed pull left is none the worse for it.
    """
    moved = ByteCount()
    with naming_version(version):
        try:
            report = fetch_documents(stored, part, version, policy)
            report.manifest.configuration(variant)
        except (VerificationError, PullError):
            for name in DOCUMENTS:
                (part / name).unlink(missing_ok=True)
            raise
    try:
        with naming_version(version):
            _sweep(part, report.manifest)
            wanted = _missing(report.manifest, part, have)
            left = sum(record.size for record in wanted.values())
            progress(f"fetching {len(wanted)} of {report.files} files, {left / 1e6:.1f} of {report.bytes / 1e6:.1f} MB")
            _fetch_files(stored, part, wanted, moved)
    except (VerificationError, PullError):
        discard(part)
        raise
    for name in wanted:
        have.keep(wanted[name], part / name)
    _settle(part)
    return report, moved


def _missing(manifest: Manifest, part: Path, have: Cache) -> dict[str, FileRecord]:
    """Take from the cache what it has, and return the rest, the largest first."""
    with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:
        took = pool.map(lambda item: have.place(item[1], part / item[0]), manifest.files.items())
        rest = [item for item, placed in zip(manifest.files.items(), took, strict=True) if not placed]
    return dict(sorted(rest, key=lambda item: -item[1].size))


def _fetch_files(stored: Artifacts, part: Path, wanted: dict[str, FileRecord], moved: ByteCount) -> None:
    problems: list[Problem] = []
    with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="pull") as pool:
        running = [
            pool.submit(download, name, part / name, record, partial(stored.open, name), moved)
            for name, record in wanted.items()
        ]
        try:
            for task in running:
                try:
                    task.result()
                except VerificationError as error:
                    problems += error.problems
        except (TrackingError, OSError):
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if problems:
        raise VerificationError(part, problems)


def _sweep(part: Path, manifest: Manifest) -> None:
    """Remove from what a killed pull left whatever is not a file of this release."""
    expected = manifest.files.keys() | set(DOCUMENTS)
    folders = {parent for name in expected for parent in (part / name).parents}
    for path in sorted(part.rglob("*"), reverse=True):
        if path.is_symlink() or (not path.is_dir() and path.relative_to(part).as_posix() not in expected):
            path.unlink()
        elif path.is_dir() and path not in folders:
            shutil.rmtree(path)


def _settle(part: Path) -> None:
    """Make everything readable to an unprivileged server, and push the names to the disk; the files were."""
    for path in [part, *part.rglob("*")]:
        set_mode(path, 0o755 if path.is_dir() else 0o644)
        if path.is_dir():
            sync_folder(path)
