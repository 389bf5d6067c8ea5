"""What is released, looked at with today's database: marked where the policy forbids it, and rolled back if asked.

The bill of materials that was signed with the release stands for the image: what is in it doesn't change, only what is
known of it. Where the bill does not suffice the image itself is scanned.
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
from containers.errors import ContainerError, ScanError
from containers.scan import scan as scans
from containers.scan import scan_gate
from containers.scan.evidence import ScanEvidence, read_scan
from containers.scan.policy import ScanPolicy
from pipeline.errors import SlipwayError, SpecError
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
from registry.pull import fetch_file
from registry.resolve import CHAMPION, PREVIOUS, resolve
from registry.suggestions import suggestion
from registry.verdict import Verdict

TAG = "slipway.rescan"
# MLflow cuts a tag's value off at 5000 characters.
_LONGEST_REASON = 2000


@dataclass(frozen=True)
class Rescanned:
    """One champion as it stands today. ``by`` is how it was looked at; ``action`` what was done about it.

    ``action`` is ``none``, ``marked``, ``rolled back`` or ``kept`` (a rollback was asked for, and what is before is no
    better or is not there); ``why`` says more of it.
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
    """What the tag of a version says of its latest rescan. Whoever can write to MLflow can write it: it is advisory."""

    blocks: bool
    status: str
    reason: str

    @classmethod
    def read(cls, tag: str) -> Mark:
        """Read the tag; one that can't be read blocks, for it is no reason to be quiet."""
        try:
            document = json.loads(tag)
            return cls(bool(document["blocks"]), str(document.get("status", "")), str(document.get("reason", "")))
        except (ValueError, KeyError, TypeError, RecursionError):
            return cls(blocks=True, status="unreadable", reason=f"the tag `{TAG}` holds no result of a rescan")


class RescanError(SlipwayError):
    """Champions that could not be looked at, each named with why. ``found`` are the others: they are marked."""

    def __init__(self, failed: Mapping[str, str], found: Sequence[Rescanned]) -> None:
        self.failed, self.found = failed, found
        super().__init__("; ".join(f"{name} could not be looked at: {why}" for name, why in failed.items()))


def rescan(settings: Settings, names: list[str], progress: Progress) -> list[Rescanned]:
    """Scan the champions of the release lines ``names``, or of all; mark each version with what came out.

    Raises:
        NotFoundError: there is no such release line, or it has no champion; nothing was looked at.
        RescanError: some could not be looked at; all others were.
    """
    found, failed = [], {}
    for name in list(_with_champion(settings, names)):
        try:
            found.append(_rescanned(settings, _meant(settings, name, CHAMPION), progress))
        except (SlipwayError, ContainerError, RegistryError) as error:
            failed[name] = " ".join(str(error).split())
            progress(f"the champion of {name} could not be looked at: {failed[name]}")
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
            hint = "it has no champion" if name in known else f"there is no such release{suggestion(name, known)}"
            raise NotFoundError(f"`{name}`: {hint}")


def _meant(settings: Settings, name: str, alias: str) -> Version:
    """Return the version that a pull of the alias gets."""
    return resolve(name, alias, settings.tracking_uri, trust_policy(trust_of(settings)))


def _rescanned(settings: Settings, version: Version, progress: Progress) -> Rescanned:
    policy = policy_of(settings, version.tags.get(MODEL_TAG), progress)
    evidence, by = looked_at(settings, f"{version.name}@{CHAMPION}", progress)
    verdict = scan_gate.judge(evidence, policy, now=datetime.now(UTC))
    progress(f"{version.name} version {version.version}: {verdict.status}, {verdict.reason}")
    for line in scan_gate.warnings(evidence, policy):
        progress(f"warning: {line}")
    _mark(settings, version, verdict, evidence)
    action, why = ("none", "") if not verdict.blocks else ("marked", f"tag `{TAG}`")
    if verdict.status == "fail" and policy.rescan == "rollback":
        action, why = _gone_back(settings, version, policy, verdict, progress)
    return Rescanned(version.name, version.version, verdict, by, action, why, evidence.seconds)


def policy_of(settings: Settings, model: str | None, progress: Progress) -> ScanPolicy:
    """The policy of the model's file as it is now; that of every image, and told so, where the file is gone.

    Raises:
        SpecError: the file is there and is wrong, be it a VEX document that is too old: nothing weaker takes its place.
    """
    try:
        path = find(model or "", settings.models)
    except SpecError as error:
        progress(f"warning: {error}: its champion is held to the policy of every image, and is not rolled back")
        return ScanPolicy()
    return load(path).scan


def looked_at(settings: Settings, reference: str, progress: Progress) -> tuple[ScanEvidence, str]:
    """Return a release's evidence under today's database, and by what it was had: ``sbom`` or ``image``.

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
            progress(f"{error}: looking at the image itself")
        record = json.loads((folder / "image.json").read_text())
        client = connect(settings.docker_host, settings.home)
        try:
            image = record["reference"] if record["pushed"] else record["image_id"]
            if record["pushed"]:
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
    told = {
        "status": verdict.status, "blocks": verdict.blocks, "reason": verdict.reason[:_LONGEST_REASON],
        "at": datetime.now(UTC).isoformat(timespec="seconds"), "database": evidence.database.digest,
    }  # fmt: skip
    with open_backend(settings.tracking_uri) as backend:
        backend.set_version_tag(version.name, version.version, TAG, json.dumps(told))


def _gone_back(
    settings: Settings, version: Version, policy: ScanPolicy, verdict: Verdict, progress: Progress
) -> tuple[str, str]:
    """Roll back, unless what was before has the same holes, or there is nothing before."""
    try:
        before = _meant(settings, version.name, PREVIOUS)
    except NotFoundError:
        return "kept", "there is no version before it"
    except RegistryError as error:
        return "kept", f"the version before it is not to be trusted: {error}"
    try:
        evidence, _ = looked_at(settings, f"{version.name}@{PREVIOUS}", progress)
    except (ContainerError, RegistryError) as error:
        return "kept", f"version {before.version} before it could not be looked at: {error}"
    other = scan_gate.judge(evidence, policy, now=datetime.now(UTC))
    _mark(settings, before, other, evidence)
    if other.status == "fail":
        return "kept", f"version {before.version} before it is refused too: {other.reason}"
    why = f"rescan: {verdict.reason}"[:_LONGEST_REASON]
    key = signing_key_if_any(settings)
    try:
        moved = rollback(version.name, settings.tracking_uri, trust_of(settings), why=why, key=key, progress=progress)
    except RegistryError as error:
        return "kept", f"no rollback: {error}"
    return "rolled back", f"version {moved.version} is champion again"
