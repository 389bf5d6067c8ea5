"""What is wrong with an image, by Trivy: vulnerabilities, secrets, misconfiguration, and its bill of materials.

`scan` writes what Trivy saw; `judgement.judge` decides, from Trivy's JSON and the state of its database, never from an
exit status: Trivy exits 0 without a word where its database is old, empty or silent on the image's distribution.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import docker
import requests

from containers.errors import ContainerError
from containers.scan import trivy
from containers.scan.policy import SEVERITIES
from containers.scan.trivy_db import Database

# Raised when the scan's evidence changes for the same inputs.
EVIDENCE_VERSION = 2
_OFFLINE = (
    "--offline-scan", "--skip-version-check", "--skip-db-update", "--skip-java-db-update", "--ignorefile", "",
    "--no-progress", "--quiet",
)  # fmt: skip
# A bill of materials is looked at as closely as the image was.
_ALL = ("--list-all-pkgs", "--detection-priority", "comprehensive")
# Stands where a finding leaves out its name, its package or the version that is installed.
UNSAID = "unknown"
# States of the database in which no vulnerability can be found.
BLIND = ("absent", "damaged", "empty")


class ScanError(ContainerError):
    """An image could not be scanned; what Trivy left is not to be trusted."""


def scan_key(image_id: str, database: Database) -> dict[str, Any]:
    """Return what decides a scan's outcome: another image, another Trivy or another database is another scan.

    A database that says the same of a later day is another, for evidence ages with its database.
    """
    return {
        "evidence": EVIDENCE_VERSION,
        "image": image_id,
        "trivy": trivy.SHA256,
        "database": {"digest": database.digest, "usable": database.is_usable, "updated_at": database.updated_at},
    }


@dataclass(frozen=True)
class Subject:
    """An image that is to be scanned, by its id (the digest of its configuration), and how Trivy gets at it.

    ``purl`` is what VEX documents call it, ``pkg:oci/NAME@DIGEST``, where it has a name.
    """

    image_id: str
    arguments: tuple[str, ...]
    variables: Mapping[str, str]
    folder: Path | None = None
    purl: str | None = None


def in_engine(
    client: docker.DockerClient, image: str, certificates: Path | None = None, purl: str | None = None
) -> Subject:
    """An image of an engine, by id or digest; ``certificates`` is the folder of a remote engine's TLS certificates.

    Raises:
        ScanError: the engine has no such image.
    """
    image_id = _image_id(client, image)
    arguments = ("--image-src", "docker", image_id)
    return Subject(image_id, arguments, trivy.engine_variables(client, certificates), purl=purl)


def in_layout(folder: Path, image_id: str, purl: str | None = None) -> Subject:
    """An image that lies in a folder (`write_layout`): of its layers, Trivy reads those that it has not seen before.

    The report calls the image by the folder's name.
    """
    return Subject(image_id, ("--input", folder.name), {}, folder.absolute().parent, purl)


def scan(
    subject: Subject, *, home: Path, folder: Path, progress: trivy.Progress, timeout_s: float = 3600.0
) -> dict[str, Any]:
    """Scan an image once and write ``trivy.json``, ``sbom.cdx.json`` and ``scan.json`` into ``folder``.

    Vulnerabilities are looked for where ``home`` has a usable database; secrets, misconfiguration and the bill of
    materials always. Nothing is downloaded.

    Args:
        subject: the image.
        home: the state folder, with Trivy's cache and database.
        folder: where the three files go.
        progress: told while Trivy works.
        timeout_s: how long the analysis may take.

    Returns:
        The evidence, as in ``scan.json``.

    Raises:
        TrivyError: Trivy is missing, failed, was killed or took too long.
        ScanError: what Trivy wrote is not a whole report on that image.
    """
    report_file, sbom_file = folder.absolute() / "trivy.json", folder.absolute() / "sbom.cdx.json"
    started = time.monotonic()
    with trivy.running(home, progress) as run:
        database = trivy.database(home)  # under Trivy's lock: nobody puts another in its place meanwhile
        scanners = ["secret", "misconfig", *(["vuln"] if database.is_usable else [])]
        progress(f"Trivy looks for {', '.join(sorted(scanners))} in {subject.image_id[7:19]}")
        run(_arguments(subject, scanners, report_file, timeout_s), subject.variables, timeout_s, subject.folder)
        run(["convert", "--quiet", "--format", "cyclonedx", "--output", str(sbom_file), str(report_file)],
            {}, timeout_s)  # fmt: skip
    seconds = time.monotonic() - started
    report = _read_report(report_file, subject.image_id)
    evidence = summarize(report, database, datetime.now(UTC), components=_components(sbom_file))
    evidence |= {"purl": subject.purl, "seconds": seconds}
    (folder / "scan.json").write_text(json.dumps(evidence, indent=1, allow_nan=False))
    progress(_summary(evidence))
    return evidence


def scan_sbom(
    sbom: Path, known: Mapping[str, Any], *, home: Path, folder: Path, progress: trivy.Progress,
    timeout_s: float = 600.0,
) -> dict[str, Any]:  # fmt: skip
    """Look for vulnerabilities in what is known to be in an image, by its bill of materials: seconds, and no image.

    Secrets and misconfiguration are those of ``known``, the evidence of the image's own scan: the image is the same.
    Writes ``rescan.trivy.json`` into ``folder``.

    Raises:
        TrivyError: Trivy failed.
        ScanError: the bill names other packages than the image's scan saw: scan the image itself.
    """
    report_file = folder.absolute() / "rescan.trivy.json"
    evidence = {**known, "scanned_at": datetime.now(UTC).isoformat(timespec="seconds")}
    evidence["trivy"] = {"version": trivy.VERSION, "sha256": trivy.SHA256}
    started = time.monotonic()
    arguments = [
        "sbom", "--scanners", "vuln", "--format", "json", "--output", str(report_file), *_ALL,
        *_OFFLINE, "--timeout", f"{round(timeout_s)}s", str(sbom.absolute()),
    ]  # fmt: skip
    with trivy.running(home, progress) as run:
        database = trivy.database(home)  # under Trivy's lock, as in `scan`
        if not database.is_usable:
            return {**evidence, "database": _database(database, *database.state_for(None, None, ()))}
        progress(f"Trivy looks for vulnerabilities in the bill of {known['packages']} packages")
        run(arguments, {}, timeout_s)
    try:
        report = json.loads(report_file.read_text())
        results = report.get("Results") or []
    except (OSError, ValueError, AttributeError) as error:
        raise ScanError(f"Trivy's report on {sbom.name} is not whole: rescan") from error
    packages = sum(len(result.get("Packages") or []) for result in results)
    if packages != known["packages"]:
        raise ScanError(f"{sbom.name} names {packages} packages, and the image's scan saw {known['packages']}")
    kinds = {str(result.get("Type")) for result in results if result.get("Class") == "lang-pkgs"}
    found = [_vulnerability(item) for result in results for item in result.get("Vulnerabilities") or []]
    state = database.state_for(known["os"]["family"], known["os"]["name"], kinds)
    return {
        **evidence,
        "database": _database(database, *state),
        "counts": _count(item["severity"] for item in found),
        "fixable": _count(item["severity"] for item in found if item["fixed"]),
        "vulnerabilities": sorted(found, key=_order),
        "seconds": time.monotonic() - started,
    }


def summarize(
    report: Mapping[str, Any], database: Database, scanned_at: datetime, *, components: int
) -> dict[str, Any]:
    """Return the evidence of one of Trivy's JSON reports, without its length: what `judge` reads."""
    results: Sequence[Mapping[str, Any]] = report.get("Results") or []
    system = report["Metadata"].get("OS") or {}
    kinds = {str(result.get("Type")) for result in results if result.get("Class") == "lang-pkgs"}
    state, lacking = database.state_for(system.get("Family"), system.get("Name"), kinds)
    vulnerabilities = [_vulnerability(item) for result in results for item in result.get("Vulnerabilities") or []]
    secrets = [_secret(result, item) for result in results for item in result.get("Secrets") or []]
    misconfigurations = [
        _misconfiguration(result, item) for result in results for item in result.get("Misconfigurations") or []
    ]
    return {
        "schema": "slipway/scan/1",
        "image_id": report["Metadata"]["ImageID"],
        "repo_digests": report["Metadata"].get("RepoDigests") or [],
        "os": {"family": system.get("Family"), "name": system.get("Name"), "end_of_life": system.get("EOSL", False)},
        "scanned_at": scanned_at.isoformat(timespec="seconds"),
        "trivy": {"version": (report.get("Trivy") or {}).get("Version", trivy.VERSION), "sha256": trivy.SHA256},
        "database": _database(database, state, lacking),
        "packages": sum(len(result.get("Packages") or []) for result in results),
        "sbom_components": components,
        "counts": _count(item["severity"] for item in vulnerabilities),
        "fixable": _count(item["severity"] for item in vulnerabilities if item["fixed"]),
        "vulnerabilities": sorted(vulnerabilities, key=_order),
        "secrets": sorted(secrets, key=_order),
        "misconfigurations": sorted(misconfigurations, key=_order),
    }  # fmt: skip


def _arguments(subject: Subject, scanners: Sequence[str], report: Path, timeout_s: float) -> list[str]:
    return [
        "image", "--scanners", ",".join(scanners),
        "--image-config-scanners", "misconfig,secret", "--format", "json", "--output", str(report), *_ALL,
        *_OFFLINE, "--skip-check-update", "--timeout", f"{round(timeout_s)}s", *subject.arguments,
    ]  # fmt: skip


def _database(database: Database, state: str, lacking: Sequence[str]) -> dict[str, Any]:
    return {
        "state": state, "lacking": list(lacking), "damage": database.damage, "digest": database.digest,
        "updated_at": database.updated_at, "next_update": database.next_update,
    }  # fmt: skip


def _image_id(client: docker.DockerClient, image: str) -> str:
    try:
        return str(client.images.get(image).id)
    except docker.errors.ImageNotFound as error:
        raise ScanError(f"the engine has no image {image}: build it again") from error
    except (docker.errors.APIError, requests.RequestException) as error:
        raise ScanError(f"the engine can't say what {image} is: {error}") from error


def _read_report(path: Path, image_id: str) -> dict[str, Any]:
    """Read Trivy's report; one that is empty, cut off or about another image is refused."""
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        version, scanned = report["SchemaVersion"], report["Metadata"]["ImageID"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScanError(f"Trivy's report {path.name} is not whole ({type(error).__name__}): scan again") from error
    if version != 2:
        raise ScanError(f"Trivy's report has schema {version}, 2 was expected")
    if scanned != image_id:
        raise ScanError(f"Trivy scanned {scanned}, not {image_id}")
    return report


def _components(sbom: Path) -> int:
    try:
        document = json.loads(sbom.read_text())
        if document["bomFormat"] != "CycloneDX":
            raise ScanError(f"{sbom.name} is no CycloneDX document")
        return len(document.get("components") or [])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScanError(f"the bill of materials {sbom.name} is not whole: scan again") from error


def _vulnerability(item: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": _said(item, "VulnerabilityID"), "package": _said(item, "PkgName", "PkgID"),
        "installed": _said(item, "InstalledVersion"),
        "fixed": item.get("FixedVersion") or None, "severity": _severity(item),
        "status": item.get("Status"), "title": item.get("Title"), "url": item.get("PrimaryURL"),
        "purl": (item.get("PkgIdentifier") or {}).get("PURL"),
    }  # fmt: skip


def _secret(result: Mapping[str, Any], item: Mapping[str, Any]) -> dict[str, Any]:
    """Where a secret is and of what kind; never the secret itself."""
    return {
        "id": _said(item, "RuleID"), "severity": _severity(item), "title": item.get("Title"),
        "target": result.get("Target"), "line": item.get("StartLine"),
    }  # fmt: skip


def _misconfiguration(result: Mapping[str, Any], item: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": _said(item, "ID", "AVDID"), "severity": _severity(item), "title": item.get("Title"),
        "target": result.get("Target"), "resolution": item.get("Resolution"), "status": item.get("Status"),
    }  # fmt: skip


def _said(item: Mapping[str, Any], *keys: str) -> str:
    """What a finding says under the first of these keys that it has; without any it is a finding still."""
    return next((str(item[key]) for key in keys if item.get(key)), UNSAID)


def _severity(item: Mapping[str, Any]) -> str:
    """One of ours: a severity that Trivy's next version may name is counted as unknown."""
    stated = str(item.get("Severity") or "").upper()
    return stated if stated in SEVERITIES else "UNKNOWN"


def _order(item: Mapping[str, Any]) -> tuple[int, str, str]:
    return SEVERITIES.index(item["severity"]), item["id"], str(item.get("package") or item.get("target"))


def _count(severities: Iterable[str]) -> dict[str, int]:
    counter = Counter(severities)
    return {severity: counter[severity] for severity in SEVERITIES}


def counted(counts: Mapping[str, int]) -> str:
    """Say how many vulnerabilities of each severity there are."""
    return (
        ", ".join(f"{counts[severity]} {severity}" for severity in SEVERITIES if counts[severity]) or "none vulnerable"
    )


def _summary(evidence: Mapping[str, Any]) -> str:
    state = evidence["database"]["state"]
    found = f"no vulnerability can be known (database {state})" if state in BLIND else counted(
        evidence["counts"]
    )  # fmt: skip
    return (
        f"{evidence['packages']} packages, {found}, {len(evidence['secrets'])} secrets, "
        f"{len(evidence['misconfigurations'])} misconfigurations in {evidence['seconds']:.1f} s"
    )
