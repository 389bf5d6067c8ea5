"""What an image may not have, and its waivers: ``containers/scan/policy.yaml``, and a model's ``scan:``.

Everything is validated when it is read, before any scan: a key that is unknown, an exception without an owner, a reason
or an end, or one that ends too late is refused. Trivy itself takes a misspelt expiry for none, and the exception never
ends.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from containers.errors import PolicyError
from containers.scan.purl import matches
from containers.scan.vex import Statement, read_vex

Severity = Literal["UNKNOWN", "LOW", "MEDIUM", "HIGH", "CRITICAL"]
Cause = Literal[
    "database-absent", "database-damaged", "database-empty", "database-incomplete", "database-stale"
]  # fmt: skip
SEVERITIES: tuple[Severity, ...] = ("CRITICAL", "HIGH", "MEDIUM", "LOW", "UNKNOWN")
# However well meant, an exception is looked at again after this time.
LONGEST_WAIVER_DAYS = 90
# From here on the release warns.
WARN_DAYS = 14

_POLICY = Path(__file__).with_name("policy.yaml")
Words = Annotated[str, Field(min_length=1, pattern=r"\S")]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AllowedSecret(_Section):
    """A finding of the secret scan that is a false alarm."""

    id: Words
    """The rule's id."""
    path: str = Field(min_length=1, pattern=r"^/")
    """The files, as a glob from `/`; `*` crosses `/`."""
    reason: Words
    """Why it is a false alarm."""

    def covers(self, finding: Mapping[str, Any]) -> bool:
        """Say whether this is the finding meant."""
        return finding["id"] == self.id and fnmatch.fnmatchcase(str(finding["target"]), self.path)


class Waiver(_Section):
    """A finding that is let through for a while."""

    id: Words
    """Of a vulnerability or a misconfiguration."""
    package: Words | None = None
    """Only this package: its name, or its purl (`pkg:deb/debian/openssl`, with a version if it is meant for that
    alone).
    """
    owner: Words
    """Who answers for it."""
    reason: Words
    """Why it may stay."""
    expires: date
    """The last day on which it holds, UTC; at most 90 days away."""

    @field_validator("expires", mode="before")
    @classmethod
    def _a_day(cls, value: object) -> object:
        """A time of day would be dropped in silence."""
        if isinstance(value, datetime) or (isinstance(value, str) and len(value) != len("2026-01-01")):
            raise ValueError("expected a day, as 2026-12-31")
        return value

    @field_validator("expires")
    @classmethod
    def _not_too_far(cls, value: date) -> date:
        latest = today() + timedelta(days=LONGEST_WAIVER_DAYS)
        if value > latest:
            raise ValueError(f"a waiver ends within {LONGEST_WAIVER_DAYS} days, by {latest}")
        return value

    def covers(self, finding: Mapping[str, Any]) -> bool:
        """Say whether this is the finding meant, whenever it is asked."""
        if finding["id"] != self.id:
            return False
        if self.package is None:
            return True
        if self.package.startswith("pkg:"):
            return matches(self.package, finding.get("purl"))
        return self.package == finding.get("package")

    def days_left(self, day: date) -> int:
        """Whole days from ``day`` to the last one on which it holds; negative once it is over."""
        return (self.expires - day).days


class CommonPolicy(_Section):
    """``containers/scan/policy.yaml``: what holds for every image, unless a model's file says otherwise."""

    fail_on: frozenset[Severity]
    unfixed: Literal["ignore", "fail"]
    secrets: Literal["fail", "ignore"]
    misconfigurations: frozenset[Severity]
    max_database_age_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    allowed_secrets: tuple[AllowedSecret, ...]
    waivers: tuple[Waiver, ...]
    vex: tuple[str, ...]


def today() -> date:
    """The day it is, UTC."""
    return datetime.now(UTC).date()


def read_common(path: Path = _POLICY) -> CommonPolicy:
    """Read and validate the policy that every image is held to.

    Raises:
        PolicyError: listing every key that is unknown, missing or wrong.
    """
    try:
        return CommonPolicy.model_validate(yaml.safe_load(path.read_text()))
    except (ValidationError, yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise PolicyError(f"{path.name} is no scan policy: {explained(error)}") from error


@functools.lru_cache(maxsize=1)
def common() -> CommonPolicy:
    """Return what containers/scan/policy.yaml says."""
    return read_common()


def explained(error: Exception) -> str:
    """One line for all that is wrong, each with its path."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    found = []
    for detail in error.errors():
        path = ".".join(str(part) for part in detail["loc"])
        words = {"extra_forbidden": f"unknown key `{path}`", "missing": f"`{path}` is missing"}
        found.append(words.get(detail["type"], f"`{path}`: {detail['msg'].removeprefix('Value error, ')}"))
    return "; ".join(found)


class ScanPolicy(_Section):
    """The ``scan:`` section of a model's file: what an image may not have. What it leaves out, policy.yaml says."""

    fail_on: frozenset[Severity] = Field(default_factory=lambda: common().fail_on)
    """Severities of vulnerabilities that count."""
    unfixed: Literal["ignore", "fail"] = Field(default_factory=lambda: common().unfixed)
    """Whether vulnerabilities without a fixed version count."""
    secrets: Literal["fail", "ignore"] = Field(default_factory=lambda: common().secrets)
    """Whether secrets of any severity count."""
    allowed_secrets: tuple[AllowedSecret, ...] = ()
    """False alarms, added to those of policy.yaml."""
    misconfigurations: frozenset[Severity] = Field(default_factory=lambda: common().misconfigurations)
    """Severities of misconfigurations that count."""
    max_database_age_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default_factory=lambda: common().max_database_age_hours
    )
    """The greatest age of Trivy's database at the verdict; beyond it the verdict is inconclusive."""
    accept_inconclusive: Mapping[Cause, Words] = {}
    """Causes of an inconclusive verdict that may pass, each with the reason."""
    waivers: tuple[Waiver, ...] = ()
    """Findings let through for a while, added to those of policy.yaml."""
    vex: tuple[Path, ...] = ()
    """OpenVEX documents, as `file:PATH`, added to those of policy.yaml."""
    rescan: Literal["mark", "rollback"] = "mark"
    """What a new finding does to the champion: the version is marked, or rolled back."""

    @field_validator("vex")
    @classmethod
    def _readable(cls, paths: tuple[Path, ...]) -> tuple[Path, ...]:
        for path in paths:
            try:
                read_vex(path)
            except PolicyError as error:
                raise ValueError(str(error)) from error
        return paths

    @property
    def all_waivers(self) -> tuple[Waiver, ...]:
        """This model's waivers and those of every image."""
        return (*self.waivers, *common().waivers)

    @property
    def all_secrets(self) -> tuple[AllowedSecret, ...]:
        """This model's false alarms and those of every image."""
        return (*self.allowed_secrets, *common().allowed_secrets)

    @property
    def statements(self) -> list[Statement]:
        """What suppliers and we ourselves say of vulnerabilities, of this model's files and of every image's.

        Raises:
            PolicyError: a file is no OpenVEX document.
        """
        paths = [*self.vex, *(_POLICY.parent / name for name in common().vex)]
        return [statement for path in paths for statement in read_vex(path)]
