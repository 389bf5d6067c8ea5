"""Pull: from an alias to a folder that an engine loads, verified before it appears under its name."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from registry import catalog, journal
from registry.artifacts import Artifacts
from registry.backend import Line, Version
from registry.cache import Cache
from registry.catalog import names, nearest
from registry.destination import beside, discard, is_empty, sync, take_place
from registry.download import Moved, download
from registry.errors import (
    DiskError,
    ManifestError,
    NotFoundError,
    Problem,
    PullError,
    TrackingError,
    VerificationError,
)
from registry.manifest import DOCUMENTS, MANIFEST, FileRecord, Manifest
from registry.policy import Policy, Trust, policy_of
from registry.stored import blamed, fetch_documents, reading
from registry.tracking import shown
from registry.verify import VerificationReport, look, verify

DEFAULT_ALIAS = "champion"
CONNECTIONS = 8
_PIN = re.compile(r"v([1-9]\d*)")


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
    progress: Callable[[str], None] = lambda _: None,
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
            Then whether it is this one is told without hashing its files, by `registry.verify.look`.
        progress: Told what is being done.

    Raises:
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
            return Pulled(name, version.version, alias, destination, True, _held(destination, version, policy))
        former = _former(destination)
        with suppress(VerificationError):  # another release, or one that is no more what was signed: fetched below
            report = look(destination, policy, version.manifest_digest)
            return Pulled(name, version.version, alias, destination, True, report)
    digest = version.manifest_digest or ""
    progress(f"{name}@{alias} is version {version.version}, {digest}")
    with reading(version, tracking_uri) as stored, beside(destination, digest, progress) as part:
        if os.path.lexists(destination) and not replace and not is_empty(destination):  # another pull was first
            return Pulled(name, version.version, alias, destination, True, _held(destination, version, policy))
        have = Cache.beside(cache, destination, former)
        report, moved = _gathered(stored, part, version, policy, have, progress)
        take_place(part, destination, replace=replace)
    return Pulled(name, version.version, alias, destination, False, report, moved.bytes)


def fetch_file(reference: str, name: str, target: Path, *, tracking_uri: str, trusted_keys: Trust) -> None:
    """Write one file of the release that ``NAME@ALIAS`` names to ``target``, held against the signed manifest.

    Raises:
        PullError, VerificationError, TrackingError: As `pull`; ``target`` is as it was.
    """
    policy = policy_of(trusted_keys)
    version = resolve(*_parsed(reference), tracking_uri, policy)
    target = target.absolute()
    digest = version.manifest_digest or ""
    with reading(version, tracking_uri) as stored, beside(target, digest, lambda _: None) as part:
        try:
            with blamed(version):
                manifest = fetch_documents(stored, part, version, policy).manifest
                if name not in manifest.files:
                    raise PullError(f"the release has no file `{name}`{nearest(name, sorted(manifest.files))}")
                download(name, part / name, manifest.files[name], partial(stored.open, name), Moved())
            (part / name).replace(target)
        finally:
            discard(part)


@dataclass(frozen=True)
class Glance:
    """A release without its weights: its signed manifest, and some of its files' bytes by path."""

    version: str
    manifest: Manifest
    files: Mapping[str, bytes]


def glance(reference: str, names: Collection[str], *, tracking_uri: str, trusted_keys: Trust) -> Glance:
    """Read the manifest of the release that ``NAME@ALIAS`` names, and those of ``names`` that it has, all verified.

    Raises:
        PullError, VerificationError, TrackingError: As `pull`.
    """
    policy = policy_of(trusted_keys)
    version = resolve(*_parsed(reference), tracking_uri, policy)
    with reading(version, tracking_uri) as stored, TemporaryDirectory(prefix="slipway-") as folder, blamed(version):
        part = Path(folder)
        manifest = fetch_documents(stored, part, version, policy).manifest
        files = {}
        for name in sorted(set(names) & manifest.files.keys()):
            download(name, part / name, manifest.files[name], partial(stored.open, name), Moved())
            files[name] = (part / name).read_bytes()
    return Glance(version.version, manifest, files)


def resolve(name: str, alias: str, tracking_uri: str, policy: Policy, cache: Path | None = None) -> Version:
    """Return the version that ``alias`` of the release line ``name`` points at, as the audit trail says it does.

    ``v3`` is version 3, for which there is no such promise. With a ``cache`` an audit trail that is shorter than one
    seen before is refused: it is the registry of an earlier day.

    Raises:
        NotFoundError: No such line, alias or version.
        PullError: The version is no release of ours, or something else than Slipway moved the alias.
    """
    pin = _PIN.fullmatch(alias)
    line, number = _settled(name, alias, pin[1] if pin else None, tracking_uri, policy)
    if cache is not None:
        _remember(cache, line, policy)
    version = catalog.version(tracking_uri, name, number)
    if version is None:
        raise NotFoundError(f"`{name}` has no version {number}")
    if version.manifest_digest is None:
        raise PullError(f"version {number} of `{name}` was not registered by Slipway: it has no signed manifest")
    other = _registered_otherwise(line, version, policy)
    if other is not None:
        raise PullError(
            f"version {number} of `{name}` is registered as {version.manifest_digest}, and a signed entry of the audit"
            f" trail says {other}: it was put in that one's place"
        )
    return version


def _settled(name: str, alias: str, pinned: str | None, tracking_uri: str, policy: Policy) -> tuple[Line, str]:
    """Return the line, and the number that is meant, once aliases and audit trail agree."""
    for attempt in range(1, 6):
        line = catalog.line(tracking_uri, name)
        if line is None:
            raise NotFoundError(f"no release `{name}` in {shown(tracking_uri)}{nearest(name, names(tracking_uri))}")
        number = pinned or line.aliases.get(alias)
        if number is None:
            raise NotFoundError(f"no version of `{name}` is `{alias}`{nearest(alias, sorted(line.aliases))}")
        # A server reads aliases and tags one after the other, so a promotion just then shows half: look again.
        why = None if pinned else _unexplained(line, alias, policy)
        if why is None:
            return line, number
        time.sleep(0.05 * 2**attempt)
    raise PullError(f"`{name}@{alias}` names version {number}, {why}")


def _unexplained(line: Line, alias: str, policy: Policy) -> str | None:
    """Say how what the alias names differs from what the audit trail says; None where it does not.

    Where moves must be signed, an act that was begun and not finished is no excuse: anybody could have said so.
    """
    advice = f"`slipway promote {line.name} --version N` says which it is to be"
    records = journal.records(line)
    if policy.signed_moves:
        entry, lacking = journal.proven(records, alias, policy.keys)
        if entry is None:
            return f"and {lacking}, which this policy asks for; {advice}"
        begun = False
    else:
        record = journal.says(records, alias)
        if record is None:
            return None
        entry, begun = record.entry, record.state == "begun"
    move = next(move for move in entry.moves if move.alias == alias)
    if line.aliases.get(alias) in ({move.before, move.after} if begun else {move.after}):
        return None
    return f"but the audit trail says {move.after}: something else than Slipway moved it; {advice}"


def _registered_otherwise(line: Line, version: Version, policy: Policy) -> str | None:
    """Return the digest that a signed entry has for the version, where that is not what it is registered with."""
    for record in journal.records(line) if policy.signed_moves else ():
        entry = record.entry
        said = entry.version == version.version and entry.digest != version.manifest_digest
        if said and record.signed_by(policy.keys) is not None:
            return entry.digest
    return None


def _remember(cache: Path, line: Line, policy: Policy) -> None:
    """Refuse an audit trail that is shorter than the one seen last; write down how long it is.

    Where moves must be signed, it is as long as its signed entries are: who has no key can't make it longer.
    """
    counted = (
        record.entry.number
        for record in reversed(journal.records(line))
        if not policy.signed_moves or record.signed_by(policy.keys) is not None
    )
    longest = next(counted, 0)
    place = cache / "seen" / line.name
    try:
        seen = int(place.read_text())
    except (OSError, ValueError):
        seen = 0
    if longest < seen:
        raise PullError(
            f"the audit trail of `{line.name}` ends at entry {longest}, and was at {seen} before: the registry was set"
            f" back; where that is right, remove `{place}`"
        )
    if longest > seen:
        new = place.with_name(f".{line.name}.{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(str(longest))
            new.replace(place)
        except OSError as error:
            raise DiskError(f"can't write to the cache `{cache}`: {error.strerror}") from error


def _parsed(reference: str) -> tuple[str, str]:
    name, at, alias = reference.partition("@")
    if not name or (at and not alias) or "@" in alias or set(name + alias) & set("/\\:'\"` "):
        raise PullError(f"`{reference}` names no release: write NAME or NAME@ALIAS, as in `demo-awq@champion`")
    return name, alias or DEFAULT_ALIAS


def _held(destination: Path, version: Version, policy: Policy) -> VerificationReport:
    """Accept a destination that is this release to the byte; refuse every other."""
    advice = "give another destination, or remove it"
    try:
        report = verify(destination, policy)
    except VerificationError as error:
        raise PullError(f"`{destination}` exists and is not this release ({error.problems[0]}): {advice}") from error
    if report.manifest_digest != version.manifest_digest:
        raise PullError(f"`{destination}` exists and holds another release, {report.manifest_digest}: {advice}")
    return report


def _former(destination: Path) -> Manifest:
    """Return the manifest of the release that is to be replaced; refuse a folder that is none."""
    try:
        return Manifest.parse((destination / MANIFEST).read_bytes())
    except (OSError, ManifestError) as error:
        raise PullError(f"`{destination}` exists and is no release: give another destination, or remove it") from error


def _gathered(
    stored: Artifacts, part: Path, version: Version, policy: Policy, have: Cache, progress: Callable[[str], None]
) -> tuple[VerificationReport, Moved]:
    """Put the release together in ``part``, every byte held against the manifest; throw it away where one differs.

    Where it is the documents that differ, they alone go: what a killed pull left is none the worse for it.
    """
    moved = Moved()
    with blamed(version):
        try:
            report = fetch_documents(stored, part, version, policy)
        except (VerificationError, PullError):
            for name in DOCUMENTS:
                (part / name).unlink(missing_ok=True)
            raise
    try:
        with blamed(version):
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


def _fetch_files(stored: Artifacts, part: Path, wanted: dict[str, FileRecord], moved: Moved) -> None:
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
        path.chmod(0o755 if path.is_dir() else 0o644)
        if path.is_dir():
            sync(path)
