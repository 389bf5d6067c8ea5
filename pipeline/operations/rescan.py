"""Scans champions with the current vulnerability database, marks them, and rolls them back if the model's file says so.

The bill of materials that was signed with the release is scanned: the image does not change, only the vulnerabilities
that are known. If the bill of materials is not enough, the image itself is scanned.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import docker
import requests

from containers.engine.engine import connect
from containers.errors import ContainerError, ImageError, ScanError
from containers.image.build import read_image
from containers.scan import scan as scans
from containers.scan import scan_gate
from containers.scan.evidence import ScanEvidence, read_scan
from containers.scan.policy import ScanPolicy
from pipeline.errors import SlipwayError, SpecError
from pipeline.publishing.attest import Rescan, StatedRelease, attest
from pipeline.publishing.promotion_file import follow_promotion
from pipeline.settings import Settings
from pipeline.spec import find, load
from pipeline.trust import signing_key_if_any, trust_of
from registry import catalog
from registry.backend import MODEL_TAG, Version
from registry.connect import open_backend
from registry.errors import NotFoundError, RegistryError
from registry.manifest import EVIDENCE
from registry.moves import rollback
from registry.policy import policy_of as trust_policy
from registry.progress import Progress
from registry.pull import fetch_file, read_metadata
from registry.resolve import CHAMPION, PREVIOUS, resolve
from registry.suggestions import suggestion
from registry.verdict import Verdict

TAG = "slipway.rescan"
# MLflow cuts a tag's value off at 5000 characters.
_LONGEST_REASON = 2000


@dataclass(frozen=True)
class Rescanned:
    """The result for one champion. ``by`` says what was scanned: ``sbom`` or ``image``.

    ``action`` is ``none``, ``marked``, ``rolled back``, or ``kept`` (a rollback was requested, but there is no better
    previous version); ``why`` explains it.
    """

    name: str
    version: str
    verdict: Verdict
    by: str
    action: str
    why: str
    seconds: float


@dataclass(frozen=True)
class Mark:
    """A version's tag with the result of its latest rescan. It is advisory: any user of MLflow can write it."""

    blocks: bool
    status: str
    reason: str

    @classmethod
    def read(cls, tag: str) -> Mark:
        """Parse the tag; one that is not valid counts as blocking, so that it is noticed."""
        try:
            document = json.loads(tag)
            return cls(bool(document["blocks"]), str(document.get("status", "")), str(document.get("reason", "")))
        except (ValueError, KeyError, TypeError, RecursionError):
            return cls(blocks=True, status="unreadable", reason=f"the tag `{TAG}` is not a valid result of a rescan")


class RescanError(SlipwayError):
    """Some champions could not be scanned: ``failed`` has the reasons. ``found`` has the results of the others."""

    def __init__(self, failed: Mapping[str, str], found: Sequence[Rescanned]) -> None:
        self.failed, self.found = failed, found
        super().__init__("; ".join(f"{name} could not be scanned: {why}" for name, why in failed.items()))


def rescan(settings: Settings, names: list[str], progress: Progress) -> list[Rescanned]:
    """Scan the champions of the release lines ``names``, or of all; mark each version with what came out.

    Raises:
        NotFoundError: there is no such release line, or it has no champion; nothing was scanned.
        RescanError: some champions could not be scanned; all others were.
    """
    found, failed = [], {}
    for name in list(_with_champion(settings, names)):
        try:
            found.append(_rescanned(settings, _version(settings, name, CHAMPION), progress))
        except (SlipwayError, ContainerError, RegistryError) as error:
            failed[name] = " ".join(str(error).split())
            progress(f"the champion of {name} could not be scanned: {failed[name]}")
    if failed:
        raise RescanError(failed, found)
    return found


def _with_champion(settings: Settings, names: list[str]) -> Iterator[str]:
    known = catalog.names(settings.tracking_uri)
    for name in names or known:
        line = catalog.line(settings.tracking_uri, name)
        if line is not None and CHAMPION in line.aliases:
            yield name
        elif names:
            hint = "it has no champion" if name in known else f"there is no such release line{suggestion(name, known)}"
            raise NotFoundError(f"`{name}`: {hint}")


def _version(settings: Settings, name: str, alias: str) -> Version:
    """Return the version that a pull of the alias fetches."""
    return resolve(name, alias, settings.tracking_uri, trust_policy(trust_of(settings)))


def _rescanned(settings: Settings, version: Version, progress: Progress) -> Rescanned:
    policy = policy_of(settings, version.tags.get(MODEL_TAG), progress)
    evidence, by = scan_release(settings, f"{version.name}@{CHAMPION}", progress)
    verdict = scan_gate.judge(evidence, policy, now=datetime.now(UTC))
    progress(f"{version.name} version {version.version}: {verdict.status}, {verdict.reason}")
    for line in scan_gate.warnings(evidence, policy):
        progress(f"warning: {line}")
    _mark(settings, version, verdict, evidence)
    _attest(settings, version, Rescan(evidence, scan_gate.waived(evidence, policy), verdict), progress)
    action, why = ("none", "") if not verdict.blocks else ("marked", f"tag `{TAG}`")
    if verdict.status == "fail" and policy.rescan == "rollback":
        action, why = _roll_back(settings, version, policy, verdict, progress)
    return Rescanned(version.name, version.version, verdict, by, action, why, evidence.seconds)


def policy_of(settings: Settings, model: str | None, progress: Progress) -> ScanPolicy:
    """The current scan policy of the model's file; the default policy, with a warning, if the file does not exist.

    Raises:
        SpecError: the file exists but is not valid, for example because a VEX document is too old.
    """
    try:
        path = find(model or "", settings.models)
    except SpecError as error:
        progress(f"warning: {error}: its champion is judged by the default policy, and is not rolled back")
        return ScanPolicy()
    return load(path).scan


def scan_release(settings: Settings, reference: str, progress: Progress) -> tuple[ScanEvidence, str]:
    """Scan a release with the current database; return the evidence, and what was scanned: ``sbom`` or ``image``.

    Raises:
        RegistryError: the release is not what was signed.
        ContainerError: neither its bill of materials nor its image can be scanned.
    """
    trusted = trust_of(settings)
    scratch = settings.home / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="rescan-") as name:
        folder = Path(name)
        for file in ("scan.json", "sbom.cdx.json", "image.json"):
            fetch_file(
                reference, f"{EVIDENCE}/{file}", folder / file,
                tracking_uri=settings.tracking_uri, trusted_keys=trusted,
            )  # fmt: skip
        known = read_scan(folder)
        try:
            sbom = folder / "sbom.cdx.json"
            return scans.scan_sbom(sbom, known, home=settings.home, folder=folder, progress=progress), "sbom"
        except ScanError as error:
            progress(f"{error}: scanning the image instead")
        record = read_image(folder)
        client = connect(settings.docker_host, settings.home)
        try:
            image = record.reference if record.pushed else record.image_id
            if record.pushed:
                _pull(client, image)
            subject = scans.in_engine(client, image, purl=known.purl)
            return scans.scan(subject, home=settings.home, folder=folder, progress=progress), "image"
        finally:
            client.close()


def _pull(client: docker.DockerClient, reference: str) -> None:
    try:
        client.images.pull(reference)
    except (docker.errors.APIError, requests.RequestException) as error:
        raise ScanError(f"the engine can't pull {reference}: {error}") from error


def _mark(settings: Settings, version: Version, verdict: Verdict, evidence: ScanEvidence) -> None:
    mark = {
        "status": verdict.status, "blocks": verdict.blocks, "reason": verdict.reason[:_LONGEST_REASON],
        "at": datetime.now(UTC).isoformat(timespec="seconds"), "database": evidence.database.digest,
    }  # fmt: skip
    with open_backend(settings.tracking_uri) as backend:
        backend.set_version_tag(version.name, version.version, TAG, json.dumps(mark))


def _attest(settings: Settings, version: Version, rescan: Rescan, progress: Progress) -> None:
    """State the result about the image in its registry, if it was pushed, so that what is admitted there is current."""
    key = signing_key_if_any(settings)
    if key is None:
        return
    reference = f"{version.name}@v{version.version}"
    found = read_metadata(reference, None, tracking_uri=settings.tracking_uri, trusted_keys=trust_of(settings))
    release = StatedRelease(found.manifest, found.files, rescan)
    if not release.image.pushed:
        return
    try:
        attest(release, key, progress)
    except ImageError as error:
        progress(f"warning: the result could not be attached to {release.manifest.image.reference}: {error}")


def _roll_back(
    settings: Settings, version: Version, policy: ScanPolicy, verdict: Verdict, progress: Progress
) -> tuple[str, str]:
    """Roll back, unless there is no previous version or it has forbidden findings too."""
    try:
        before = _version(settings, version.name, PREVIOUS)
    except NotFoundError:
        return "kept", "there is no previous version"
    except RegistryError as error:
        return "kept", f"the previous version is not trusted: {error}"
    try:
        evidence, _ = scan_release(settings, f"{version.name}@{PREVIOUS}", progress)
    except (ContainerError, RegistryError) as error:
        return "kept", f"the previous version, {before.version}, could not be scanned: {error}"
    other = scan_gate.judge(evidence, policy, now=datetime.now(UTC))
    _mark(settings, before, other, evidence)
    if other.status == "fail":
        return "kept", f"the previous version, {before.version}, is refused too: {other.reason}"
    why = f"rescan: {verdict.reason}"[:_LONGEST_REASON]
    key = signing_key_if_any(settings)
    try:
        moved = rollback(version.name, settings.tracking_uri, trust_of(settings), why=why, key=key, progress=progress)
    except RegistryError as error:
        return "kept", f"the rollback failed: {error}"
    follow_promotion(version.name, settings, progress)
    return "rolled back", f"version {moved.version} is champion again"
