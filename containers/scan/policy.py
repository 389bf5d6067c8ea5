"""The scan's policy and its waivers: ``containers/scan/policy.yaml``, and the ``scan:`` section of a model's file.

Everything is validated when it is read, before any scan: an unknown key, or a waiver without an owner, a reason or an
end, or with too late an end is refused. Trivy itself ignores a misspelt expiry date, and the exception never expires.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from containers.errors import PolicyError
from containers.scan.evidence import Misconfiguration, Secret, Severity, Vulnerability
from containers.scan.purl import matches
from containers.scan.vex import Statement, read_vex

Cause = Literal[
    "database-absent", "database-damaged", "database-empty", "database-incomplete", "database-stale"
]  # fmt: skip
# A waiver must be reviewed after this time.
LONGEST_WAIVER_DAYS = 90
# A release warns about waivers that expire within this time.
WARN_DAYS = 14

_POLICY = Path(__file__).with_name("policy.yaml")
Words = Annotated[str, Field(min_length=1, pattern=r"\S")]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AllowedSecret(_Section):
    """A false alarm of the secret scan."""

    id: Words
    """The id of Trivy's rule."""
    path: str = Field(min_length=1, pattern=r"^/")
    """The files, as a glob from `/`; `*` crosses `/`."""
    reason: Words
    """Why the finding is a false alarm."""

    def covers(self, finding: Secret) -> bool:
        """Return whether the rule and the path match the finding."""
        return finding.id == self.id and fnmatch.fnmatchcase(finding.place, self.path)


class Waiver(_Section):
    """A finding that is allowed for a limited time."""

    id: Words
    """The id of a vulnerability or a misconfiguration."""
    package: Words | None = None
    """Only this package, by name or purl (`pkg:deb/debian/openssl`; a version in the purl limits the waiver to it)."""
    owner: Words
    """Who is responsible for the waiver."""
    reason: Words
    """Why the finding is acceptable."""
    expires: date
    """The last day on which the waiver holds, UTC; at most 90 days ahead."""

    @field_validator("expires", mode="before")
    @classmethod
    def _a_day(cls, value: object) -> object:
        """Refuse a time of day, which would be ignored."""
        if isinstance(value, datetime) or (isinstance(value, str) and len(value) != len("2026-01-01")):
            raise ValueError("expected a date without a time, like 2026-12-31")
        return value

    @field_validator("expires")
    @classmethod
    def _not_too_far(cls, value: date) -> date:
        latest = today() + timedelta(days=LONGEST_WAIVER_DAYS)
        if value > latest:
            raise ValueError(f"a waiver must expire within {LONGEST_WAIVER_DAYS} days, by {latest}")
        return value

    def covers(self, finding: Vulnerability | Misconfiguration) -> bool:
        """Return whether the waiver names this finding, whether or not it has expired."""
        if finding.id != self.id:
            return False
        if self.package is None:
            return True
        if not isinstance(finding, Vulnerability):
            return False
        if self.package.startswith("pkg:"):
            return matches(self.package, finding.purl)
        return self.package == finding.package

    def days_left(self, day: date) -> int:
        """Return the whole days from ``day`` to the last one on which it holds; negative after that."""
        return (self.expires - day).days


class CommonPolicy(_Section):
    """``containers/scan/policy.yaml``: the defaults for every image."""

    fail_on: frozenset[Severity]
    unfixed: Literal["ignore", "fail"]
    secrets: Literal["fail", "ignore"]
    misconfigurations: frozenset[Severity]
    max_database_age_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    allowed_secrets: tuple[AllowedSecret, ...]
    waivers: tuple[Waiver, ...]
    vex: tuple[str, ...]


def today() -> date:
    """Return today's date, UTC."""
    return datetime.now(UTC).date()


def read_common(path: Path = _POLICY) -> CommonPolicy:
    """Read and validate the policy of every image.

    Raises:
        PolicyError: lists every key that is unknown, missing or invalid.
    """
    try:
        return CommonPolicy.model_validate(yaml.safe_load(path.read_text()))
    except (ValidationError, yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise PolicyError(f"{path.name} is not a valid scan policy: {explained(error)}") from error


@functools.lru_cache(maxsize=1)
def common() -> CommonPolicy:
    """Return the policy in containers/scan/policy.yaml, read once."""
    return read_common()


def explained(error: Exception) -> str:
    """List every problem in one line, each with its key's path."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    found = []
    for detail in error.errors():
        path = ".".join(str(part) for part in detail["loc"])
        words = {"extra_forbidden": f"unknown key `{path}`", "missing": f"`{path}` is missing"}
        found.append(words.get(detail["type"], f"`{path}`: {detail['msg'].removeprefix('Value error, ')}"))
    return "; ".join(found)


class ScanPolicy(_Section):
    """The ``scan:`` section of a model's file: which findings fail its image. Defaults come from policy.yaml."""

    fail_on: frozenset[Severity] = Field(default_factory=lambda: common().fail_on)
    """Severities of vulnerabilities that fail the gate."""
    unfixed: Literal["ignore", "fail"] = Field(default_factory=lambda: common().unfixed)
    """Whether vulnerabilities without a fixed version fail the gate."""
    secrets: Literal["fail", "ignore"] = Field(default_factory=lambda: common().secrets)
    """Whether secrets, of any severity, fail the gate."""
    allowed_secrets: tuple[AllowedSecret, ...] = ()
    """False alarms, in addition to those of policy.yaml."""
    misconfigurations: frozenset[Severity] = Field(default_factory=lambda: common().misconfigurations)
    """Severities of misconfigurations that fail the gate."""
    max_database_age_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default_factory=lambda: common().max_database_age_hours
    )
    """The greatest age of Trivy's database when the gate judges; with an older one the verdict is inconclusive."""
    accept_inconclusive: Mapping[Cause, Words] = {}
    """Causes of an inconclusive verdict that are accepted, each with a reason."""
    waivers: tuple[Waiver, ...] = ()
    """Findings that are allowed for a limited time, in addition to those of policy.yaml."""
    vex: tuple[Path, ...] = ()
    """OpenVEX documents, as `file:PATH`, in addition to those of policy.yaml."""
    rescan: Literal["mark", "rollback"] = "mark"
    """What a rescan does to a champion with a new finding: mark the version, or roll it back too."""

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
        """The waivers of this model and of policy.yaml."""
        return (*self.waivers, *common().waivers)

    @property
    def all_secrets(self) -> tuple[AllowedSecret, ...]:
        """The allowed secrets of this model and of policy.yaml."""
        return (*self.allowed_secrets, *common().allowed_secrets)

    @property
    def statements(self) -> list[Statement]:
        """The VEX statements of this model's documents and of policy.yaml's.

        Raises:
            PolicyError: a file is not a valid OpenVEX document.
        """
        paths = [*self.vex, *(_POLICY.parent / name for name in common().vex)]
        return [statement for path in paths for statement in read_vex(path)]
