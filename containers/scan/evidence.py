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
    package: str
    installed: str
    fixed: str | None = None
    severity: TrivySeverity
    status: str | None = None
    title: str | None = None
    url: str | None = None
    purl: str | None = None

    @property
    def place(self) -> str:
        """The package it is in."""
        return self.package


class Secret(_Part):
    """Where a secret is and of what kind; never the secret itself."""

    id: str
    severity: TrivySeverity
    title: str | None = None
    target: str | None = None
    line: int | None = None

    @property
    def place(self) -> str:
        """The file it is in."""
        return self.target or UNSTATED


class Misconfiguration(_Part):
    """A setting of the image that Trivy's checks advise against."""

    id: str
    severity: TrivySeverity
    title: str | None = None
    target: str | None = None
    resolution: str | None = None
    status: str | None = None

    @property
    def place(self) -> str:
        """What it is a setting of."""
        return self.target or UNSTATED


class OperatingSystem(_Part):
    """The image's distribution as Trivy names it; None where Trivy recognized none."""

    family: str | None = None
    name: str | None = None
    end_of_life: bool = False


class TrivyBuild(_Part):
    """The Trivy that scanned: its version, and the sha256 of its binary."""

    version: str
    sha256: str


class DatabaseUsed(_Part):
    """The vulnerability database at the time of the scan; ``lacking`` names what it holds no advisories for."""

    state: DatabaseState
    lacking: tuple[str, ...] = ()
    damage: str | None = None
    digest: str | None = None
    updated_at: str | None = None
    next_update: str | None = None

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
    image_id: str
    repo_digests: tuple[str, ...] = ()
    os: OperatingSystem
    scanned_at: Timestamp
    trivy: TrivyBuild
    database: DatabaseUsed
    packages: Count
    sbom_components: Count
    counts: Mapping[Severity, Count]
    fixable: Mapping[Severity, Count]
    vulnerabilities: tuple[Vulnerability, ...] = ()
    secrets: tuple[Secret, ...] = ()
    misconfigurations: tuple[Misconfiguration, ...] = ()
    purl: str | None = None
    seconds: float = 0.0


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
        return ScanEvidence.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ScanError(f"{path} can't be read ({error.strerror}): scan the image again") from error
    except ValidationError as error:
        raise ScanError(f"{path}: {first_problem(error)}: scan the image again") from error
