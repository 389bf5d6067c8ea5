"""Scans an image with Trivy: vulnerabilities, secrets, misconfigurations, and the bill of materials.

`scan` writes what Trivy found; `scan_gate.judge` decides. Neither uses Trivy's exit status: Trivy exits 0 and prints
nothing when its database is old, empty, or holds nothing for the image's distribution.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

import docker
import requests

from containers.errors import ScanError
from containers.scan import trivy
from containers.scan.evidence import (
    SEVERITIES,
    UNSTATED,
    DatabaseUsed,
    Misconfiguration,
    OperatingSystem,
    ScanEvidence,
    Secret,
    Severity,
    TrivyBuild,
    Vulnerability,
    write_scan,
)
from containers.scan.trivy_db import Database
from registry.progress import Progress

# Raised when the scan's evidence changes for the same inputs.
EVIDENCE_VERSION = 2
_OFFLINE = (
    "--offline-scan", "--skip-version-check", "--skip-db-update", "--skip-java-db-update", "--ignorefile", "",
    "--no-progress", "--quiet",
)  # fmt: skip
# The same for images and bills of materials, so that both find the same packages.
_ALL = ("--list-all-pkgs", "--detection-priority", "comprehensive")


def scan_key(image_id: str, database: Database) -> dict[str, object]:
    """Return what a scan's result depends on: the image, Trivy and the database.

    The database's date is part of the key: the gate judges the age of the database that the evidence names.
    """
    return {
        "evidence": EVIDENCE_VERSION,
        "image": image_id,
        "trivy": trivy.SHA256,
        "database": {"digest": database.digest, "usable": database.is_usable, "updated_at": database.updated_at},
    }


@dataclass(frozen=True)
class ScanTarget:
    """An image to scan, by its id (the digest of its configuration), and how Trivy reads it.

    ``purl`` is its name in VEX documents, ``pkg:oci/NAME@DIGEST``, if it has one.
    """

    image_id: str
    arguments: tuple[str, ...]
    variables: Mapping[str, str]
    folder: Path | None = None
    purl: str | None = None


def in_engine(
    client: docker.DockerClient, image: str, certificates: Path | None = None, purl: str | None = None
) -> ScanTarget:
    """Target an engine's image, by id or digest; ``certificates`` is the folder of a remote engine's TLS certificates.

    Raises:
        ScanError: the engine has no such image.
    """
    image_id = _image_id(client, image)
    arguments = ("--image-src", "docker", image_id)
    return ScanTarget(image_id, arguments, trivy.engine_variables(client, certificates), purl=purl)


def in_layout(folder: Path, image_id: str, purl: str | None = None) -> ScanTarget:
    """Target an image in an OCI layout folder (`write_layout`): Trivy skips layers that it has cached.

    Trivy's report names the image after the folder.
    """
    return ScanTarget(image_id, ("--input", folder.name), {}, folder.absolute().parent, purl)


def scan(
    target: ScanTarget, *, home: Path, folder: Path, progress: Progress, timeout_s: float = 3600.0
) -> ScanEvidence:
    """Scan an image once and write ``trivy.json``, ``sbom.cdx.json`` and ``scan.json`` into ``folder``.

    Vulnerabilities are searched only if ``home`` has a usable database; secrets, misconfigurations and the bill of
    materials always. Nothing is downloaded.

    Args:
        target: the image.
        home: the state folder, with Trivy's cache and database.
        folder: where the three files go.
        progress: called with a line while Trivy works.
        timeout_s: how long the analysis may take.

    Returns:
        The evidence written to ``scan.json``.

    Raises:
        TrivyError: Trivy is missing, failed, was killed or took too long.
        ScanError: Trivy's report is incomplete or about another image.
    """
    report_file, sbom_file = folder.absolute() / "trivy.json", folder.absolute() / "sbom.cdx.json"
    started = time.monotonic()
    with trivy.running(home, progress) as run:
        database = trivy.database(home)  # under Trivy's lock, so that an update can't replace it meanwhile
        scanners = ["secret", "misconfig", *(["vuln"] if database.is_usable else [])]
        progress(f"Trivy scans {target.image_id[7:19]} for {', '.join(sorted(scanners))}")
        run(_arguments(target, scanners, report_file, timeout_s), target.variables, timeout_s, target.folder)
        run(["convert", "--quiet", "--format", "cyclonedx", "--output", str(sbom_file), str(report_file)],
            {}, timeout_s)  # fmt: skip
    seconds = time.monotonic() - started
    report = _read_report(report_file, target.image_id)
    evidence = summarize(report, database, datetime.now(UTC), components=_components(sbom_file)).model_copy(
        update={"purl": target.purl, "seconds": seconds}
    )
    write_scan(evidence, folder)
    progress(_summary(evidence))
    return evidence


def scan_sbom(
    sbom: Path, known: ScanEvidence, *, home: Path, folder: Path, progress: Progress, timeout_s: float = 600.0
) -> ScanEvidence:
    """Search the packages of an image's bill of materials for vulnerabilities; takes seconds and needs no image.

    Secrets and misconfigurations are copied from ``known``, the evidence of the image's own scan.
    Writes ``rescan.trivy.json`` into ``folder``.

    Raises:
        TrivyError: Trivy failed.
        ScanError: the bill has another number of packages than the image's scan found: scan the image itself.
    """
    report_file = folder.absolute() / "rescan.trivy.json"
    build = TrivyBuild(version=trivy.VERSION, sha256=trivy.SHA256)
    started = time.monotonic()
    arguments = [
        "sbom", "--scanners", "vuln", "--format", "json", "--output", str(report_file), *_ALL,
        *_OFFLINE, "--timeout", f"{round(timeout_s)}s", str(sbom.absolute()),
    ]  # fmt: skip
    with trivy.running(home, progress) as run:
        database = trivy.database(home)  # under Trivy's lock, as in `scan`
        evidence = known.model_copy(update={"scanned_at": datetime.now(UTC).replace(microsecond=0), "trivy": build})
        if not database.is_usable:
            return evidence.model_copy(update={"database": _database(database, None, None, ())})
        progress(f"Trivy searches {known.packages} packages of the bill of materials for vulnerabilities")
        run(arguments, {}, timeout_s)
    try:
        report = json.loads(report_file.read_text())
        results = report.get("Results") or []
    except (OSError, ValueError, AttributeError) as error:
        raise ScanError(f"Trivy's report on {sbom.name} is incomplete: run `slipway rescan` again") from error
    packages = _packages(results)
    if packages != known.packages:
        raise ScanError(f"{sbom.name} lists {packages} packages, but the image's scan found {known.packages}")
    return evidence.model_copy(
        update={
            "database": _database(database, known.os.family, known.os.name, _kinds(results)),
            **_vulnerabilities(results),
            "seconds": time.monotonic() - started,
        }
    )


def summarize(report: Mapping[str, Any], database: Database, scanned_at: datetime, *, components: int) -> ScanEvidence:
    """Return the evidence of one of Trivy's JSON reports."""
    results: Sequence[Mapping[str, Any]] = report.get("Results") or []
    system = report["Metadata"].get("OS") or {}
    secrets = [_secret(result, item) for result in results for item in result.get("Secrets") or []]
    misconfigurations = [
        _misconfiguration(result, item) for result in results for item in result.get("Misconfigurations") or []
    ]
    return ScanEvidence(
        image_id=report["Metadata"]["ImageID"],
        repo_digests=report["Metadata"].get("RepoDigests") or (),
        os=OperatingSystem(family=system.get("Family"), name=system.get("Name"), end_of_life=system.get("EOSL", False)),
        scanned_at=scanned_at.replace(microsecond=0),
        trivy=TrivyBuild(version=(report.get("Trivy") or {}).get("Version", trivy.VERSION), sha256=trivy.SHA256),
        database=_database(database, system.get("Family"), system.get("Name"), _kinds(results)),
        packages=_packages(results),
        sbom_components=components,
        **_vulnerabilities(results),
        secrets=tuple(sorted(secrets, key=_order)),
        misconfigurations=tuple(sorted(misconfigurations, key=_order)),
    )


def _arguments(target: ScanTarget, scanners: Sequence[str], report: Path, timeout_s: float) -> list[str]:
    return [
        "image", "--scanners", ",".join(scanners),
        "--image-config-scanners", "misconfig,secret", "--format", "json", "--output", str(report), *_ALL,
        *_OFFLINE, "--skip-check-update", "--timeout", f"{round(timeout_s)}s", *target.arguments,
    ]  # fmt: skip


def _database(database: Database, family: str | None, release: str | None, kinds: Iterable[str]) -> DatabaseUsed:
    state, lacking = database.state_for(family, release, kinds)
    return DatabaseUsed(
        state=state,
        lacking=tuple(lacking),
        damage=database.damage,
        digest=database.digest,
        updated_at=database.updated_at,
        next_update=database.next_update,
    )


def _image_id(client: docker.DockerClient, image: str) -> str:
    try:
        return str(client.images.get(image).id)
    except docker.errors.ImageNotFound as error:
        raise ScanError(f"the container engine has no image {image}: build it again") from error
    except (docker.errors.APIError, requests.RequestException) as error:
        raise ScanError(f"the container engine can't inspect {image}: {error}") from error


def _read_report(path: Path, image_id: str) -> dict[str, Any]:
    """Read Trivy's report; refuse one that is empty, truncated or about another image."""
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        version, scanned = report["SchemaVersion"], report["Metadata"]["ImageID"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScanError(f"Trivy's report {path.name} is incomplete ({type(error).__name__}): scan again") from error
    if version != 2:
        raise ScanError(f"Trivy's report {path.name} has schema {version}, expected 2: install Trivy {trivy.VERSION}")
    if scanned != image_id:
        raise ScanError(f"Trivy scanned {scanned}, not {image_id}")
    return report


def _components(sbom: Path) -> int:
    try:
        document = json.loads(sbom.read_text())
        if document["bomFormat"] != "CycloneDX":
            raise ScanError(f"{sbom.name} is not a CycloneDX document: scan again")
        return len(document.get("components") or [])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScanError(f"the bill of materials {sbom.name} is incomplete: scan again") from error


def _packages(results: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(result.get("Packages") or []) for result in results)


def _kinds(results: Sequence[Mapping[str, Any]]) -> set[str]:
    """The kinds of language packages among Trivy's results (``python-pkg``)."""
    return {str(result.get("Type")) for result in results if result.get("Class") == "lang-pkgs"}


class _Vulnerabilities(TypedDict):
    counts: Mapping[Severity, int]
    fixable: Mapping[Severity, int]
    vulnerabilities: tuple[Vulnerability, ...]


def _vulnerabilities(results: Sequence[Mapping[str, Any]]) -> _Vulnerabilities:
    found = [_vulnerability(item) for result in results for item in result.get("Vulnerabilities") or []]
    return {
        "counts": _count(item.severity for item in found),
        "fixable": _count(item.severity for item in found if item.fixed),
        "vulnerabilities": tuple(sorted(found, key=_order)),
    }


def _vulnerability(item: Mapping[str, Any]) -> Vulnerability:
    return Vulnerability(
        id=_stated(item, "VulnerabilityID"),
        package=_stated(item, "PkgName", "PkgID"),
        installed=_stated(item, "InstalledVersion"),
        fixed=item.get("FixedVersion") or None,
        severity=item.get("Severity"),
        status=item.get("Status"),
        title=item.get("Title"),
        url=item.get("PrimaryURL"),
        purl=(item.get("PkgIdentifier") or {}).get("PURL"),
    )


def _secret(result: Mapping[str, Any], item: Mapping[str, Any]) -> Secret:
    return Secret(
        id=_stated(item, "RuleID"),
        severity=item.get("Severity"),
        title=item.get("Title"),
        target=result.get("Target"),
        line=item.get("StartLine"),
    )


def _misconfiguration(result: Mapping[str, Any], item: Mapping[str, Any]) -> Misconfiguration:
    return Misconfiguration(
        id=_stated(item, "ID", "AVDID"),
        severity=item.get("Severity"),
        title=item.get("Title"),
        target=result.get("Target"),
        resolution=item.get("Resolution"),
        status=item.get("Status"),
    )


def _stated(item: Mapping[str, Any], *keys: str) -> str:
    """The value of the first of these keys that a finding has; a finding without any still counts."""
    return next((str(item[key]) for key in keys if item.get(key)), UNSTATED)


def _order(item: Vulnerability | Secret | Misconfiguration) -> tuple[int, str, str]:
    return SEVERITIES.index(item.severity), item.id, item.place


def _count(severities: Iterable[Severity]) -> dict[Severity, int]:
    counter = Counter(severities)
    return {severity: counter[severity] for severity in SEVERITIES}


def counts_text(counts: Mapping[Severity, int]) -> str:
    """Describe the number of vulnerabilities of each severity: ``1 CRITICAL, 3 LOW``."""
    return (
        ", ".join(f"{counts[severity]} {severity}" for severity in SEVERITIES if counts[severity])
        or "no vulnerabilities"
    )


def _summary(evidence: ScanEvidence) -> str:
    database = evidence.database
    found = (
        f"vulnerabilities unknown (database {database.state})" if database.is_blind else counts_text(evidence.counts)
    )
    return (
        f"{evidence.packages} packages in {evidence.seconds:.1f} s: {found}; secrets: {len(evidence.secrets)}; "
        f"misconfigurations: {len(evidence.misconfigurations)} (the gate decides which of them count)"
    )
