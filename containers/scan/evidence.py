"""The scan's evidence, ``scan.json``: what Trivy found in an image, and which database it looked in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from containers.errors import ScanError
from registry.errors import first_problem

FILE = "scan.json"
Severity = Literal["UNKNOWN", "LOW", "MEDIUM", "HIGH", "CRITICAL"]
SEVERITIES: tuple[Severity, ...] = ("CRITICAL", "HIGH", "MEDIUM", "LOW", "UNKNOWN")
DatabaseState = Literal["absent", "damaged", "empty", "incomplete", "ok"]
# Stands where a finding leaves out its name, its package or the installed version.
UNSTATED = "unknown"


def _known_severity(stated: object) -> str:
    """Count a severity that Trivy's next version may add as unknown."""
    upper = str(stated or "").upper()
    return upper if upper in SEVERITIES else "UNKNOWN"


TrivySeverity = Annotated[Severity, BeforeValidator(_known_severity)]
Count = Annotated[int, Field(ge=0)]
Timestamp = Annotated[AwareDatetime, PlainSerializer(datetime.isoformat, return_type=str, when_used="json")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Vulnerability(_Part):
    """A vulnerability of an installed package; ``fixed`` is the first version without it."""

    id: str
    """The vulnerability's id, such as CVE-2026-0001."""
    package: str
    """The package's name."""
    installed: str
    """The installed version."""
    fixed: str | None = None
    """The first version without the vulnerability."""
    severity: TrivySeverity
    """Trivy's severity."""
    status: str | None = None
    """The distribution's status of the vulnerability."""
    title: str | None = None
    """A short description."""
    url: str | None = None
    """A page about it."""
    purl: str | None = None
    """The package's purl."""

    @property
    def place(self) -> str:
        """The package it is in."""
        return self.package


class Secret(_Part):
    """Where a secret is and of what kind; never the secret itself."""

    id: str
    """The id of Trivy's rule."""
    severity: TrivySeverity
    """Trivy's severity."""
    title: str | None = None
    """The kind of secret."""
    target: str | None = None
    """The file in the image."""
    line: int | None = None
    """The line in the file."""

    @property
    def place(self) -> str:
        """The file it is in."""
        return self.target or UNSTATED


class Misconfiguration(_Part):
    """A setting of the image that Trivy's checks advise against."""

    id: str
    """The id of Trivy's check."""
    severity: TrivySeverity
    """Trivy's severity."""
    title: str | None = None
    """A short description."""
    target: str | None = None
    """What was checked."""
    resolution: str | None = None
    """How to correct it."""
    status: str | None = None
    """The result of the check."""

    @property
    def place(self) -> str:
        """What it is a setting of."""
        return self.target or UNSTATED


class OperatingSystem(_Part):
    """The image's distribution as Trivy names it; None where Trivy recognized none."""

    family: str | None = None
    """The distribution, such as `debian`."""
    name: str | None = None
    """The distribution's version."""
    end_of_life: bool = False
    """Whether the distribution's support has ended."""


class TrivyBuild(_Part):
    """The Trivy that scanned: its version, and the sha256 of its binary."""

    version: str
    """Trivy's version."""
    sha256: str
    """The sha256 of Trivy's binary."""


class DatabaseUsed(_Part):
    """The vulnerability database at the time of the scan; ``lacking`` names what it holds no advisories for."""

    state: DatabaseState
    """Whether the database could be used."""
    lacking: tuple[str, ...] = ()
    """Systems and ecosystems that the database has no advisories for."""
    damage: str | None = None
    """What is wrong with the database's file."""
    digest: str | None = None
    """The digest of the database."""
    updated_at: str | None = None
    """When the database was made."""
    next_update: str | None = None
    """When the next database is expected."""

    @property
    def is_blind(self) -> bool:
        """Whether no vulnerability can be found with it, so that zero found means nothing."""
        return self.state in {"absent", "damaged", "empty"}

    def age_hours(self, at: datetime) -> float | None:
        """Its age in hours at a time; None where its date is unknown."""
        if self.updated_at is None:
            return None
        return (at - datetime.fromisoformat(self.updated_at)).total_seconds() / 3600


class ScanEvidence(_Part):
    """What ``scan.json`` holds. ``purl`` is the image's name in VEX documents; ``seconds`` is how long Trivy took."""

    schema_: Annotated[Literal["slipway/scan/1"], Field(alias="schema")] = "slipway/scan/1"
    """The format of this document."""
    image_id: str
    """The engine's id of the image."""
    repo_digests: tuple[str, ...] = ()
    """The image's digests in registries."""
    os: OperatingSystem
    """The image's distribution."""
    scanned_at: Timestamp
    """When the image was scanned, UTC."""
    trivy: TrivyBuild
    """The Trivy that scanned."""
    database: DatabaseUsed
    """The vulnerability database that was used."""
    packages: Count
    """Number of packages found."""
    sbom_components: Count
    """Number of components in the bill of materials."""
    counts: Mapping[Severity, Count]
    """Number of vulnerabilities by severity."""
    fixable: Mapping[Severity, Count]
    """Number of vulnerabilities with a fixed version, by severity."""
    vulnerabilities: tuple[Vulnerability, ...] = ()
    """All vulnerabilities found."""
    secrets: tuple[Secret, ...] = ()
    """All secrets found, without their values."""
    misconfigurations: tuple[Misconfiguration, ...] = ()
    """All misconfigurations found."""
    purl: str | None = None
    """The image's name in VEX documents."""
    seconds: float = 0.0
    """How long the scan took."""


def write_scan(evidence: ScanEvidence, folder: Path) -> Path:
    """Write ``scan.json`` into ``folder`` and return its path."""
    path = folder / FILE
    path.write_text(json.dumps(evidence.model_dump(mode="json", by_alias=True), indent=1, allow_nan=False))
    return path


def read_scan(folder: Path) -> ScanEvidence:
    """Read ``scan.json`` in ``folder``.

    Raises:
        ScanError: it is missing, or not what ``write_scan`` writes.
    """
    path = folder / FILE
    try:
        return parse_scan(path.read_bytes(), str(path))
    except OSError as error:
        raise ScanError(f"{path} can't be read ({error.strerror}): scan the image again") from error


def parse_scan(data: bytes, where: str) -> ScanEvidence:
    """Read what ``scan.json`` holds; ``ScanError``, which names the file as ``where``, if it is not valid."""
    try:
        return ScanEvidence.model_validate_json(data)
    except ValidationError as error:
        raise ScanError(f"{where}: {first_problem(error)}: scan the image again") from error
