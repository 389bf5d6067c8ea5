"""OpenVEX documents: what a supplier, or we ourselves, say of a vulnerability in a product, read strictly.

The format is OpenVEX 0.2.0 (openvex.dev). A statement of ``not_affected`` gives its reason, as the specification asks;
a document that is older than `OLDEST_DAYS`, or of the future, is refused, for nothing else in the format makes a
statement end. Of the statements about a finding, the latest counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import MAXYEAR, MINYEAR, UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from containers.errors import PolicyError
from containers.scan.purl import matches
from registry.bounded_json import Bounds, read_json

OLDEST_DAYS = 365
# How far the clocks of those who write documents may be ahead of ours.
_CLOCKS_APART = timedelta(hours=1)
_BOUNDS = Bounds(bytes=16 << 20, values=500_000)
_MOST_SHOWN = 5
_CONTEXT = "https://openvex.dev/ns"
Status = Literal["not_affected", "affected", "fixed", "under_investigation"]
Justification = Literal[
    "component_not_present", "vulnerable_code_not_present", "vulnerable_code_not_in_execute_path",
    "vulnerable_code_cannot_be_controlled_by_adversary", "inline_mitigations_already_exist",
]  # fmt: skip
Words = Annotated[str, Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class _Component(_Part):
    id: Words = Field(alias="@id")
    identifiers: Mapping[str, str] = {}
    hashes: Mapping[str, str] = {}

    def is_(self, purl: str | None) -> bool:
        """Say whether this names the package or image with that purl, by its id and by its identifier.

        Both must, where both are there: of a component whose id is an image and whose identifier is a package nobody
        can say which is meant. Hashes can't be compared with anything that a scan finds, so that one with them is
        none that was found.
        """
        named = [self.id, *(value for kind, value in self.identifiers.items() if kind == "purl")]
        return not self.hashes and all(name.startswith("pkg:") and matches(name, purl) for name in named)


class _Product(_Component):
    subcomponents: tuple[_Component, ...] = ()


class _Vulnerability(_Part):
    id: str | None = Field(default=None, alias="@id")
    name: Words
    description: str | None = None
    aliases: tuple[str, ...] = ()


class Statement(_Part):
    """One statement: of which vulnerability, in which products, with which status and why."""

    id: str | None = Field(default=None, alias="@id")
    version: int | None = None
    vulnerability: _Vulnerability
    products: tuple[_Product, ...] = Field(min_length=1)
    status: Status
    status_notes: str | None = None
    supplier: str | None = None
    justification: Justification | None = None
    impact_statement: str | None = None
    action_statement: str | None = None
    action_statement_timestamp: datetime | None = None
    timestamp: datetime | None = None
    last_updated: datetime | None = None
    author: str = Field(default="", exclude=True)
    source: str = Field(default="", exclude=True)
    made: datetime = Field(default=datetime.min.replace(tzinfo=UTC), exclude=True)

    @model_validator(mode="after")
    def _reasoned(self) -> Statement:
        if self.status == "not_affected" and not (self.justification or self.impact_statement):
            raise ValueError("`not_affected` needs a `justification` or an `impact_statement`")
        if self.status == "affected" and not self.action_statement:
            raise ValueError("`affected` needs an `action_statement`")
        return self

    @property
    def clears(self) -> bool:
        """Whether the statement takes a finding away."""
        return self.status in {"not_affected", "fixed"}

    @property
    def reason(self) -> str:
        """Why, in words."""
        return self.impact_statement or (self.justification or self.status).replace("_", " ")

    def covers(self, finding: Mapping[str, Any], image: str | None = None) -> bool:
        """Say whether this is the finding meant: the vulnerability, by name or alias, in this very package.

        A product with ``subcomponents`` is an image with packages in it: it must be the one whose purl is ``image``.
        """
        if finding["id"] not in {self.vulnerability.name, *self.vulnerability.aliases}:
            return False
        return any(
            any(part.is_(finding.get("purl")) for part in product.subcomponents) and product.is_(image)
            if product.subcomponents
            else product.is_(finding.get("purl"))
            for product in self.products
        )


class _Document(_Part):
    context: str = Field(alias="@context", pattern=rf"^{_CONTEXT}(/v0\.2\.\d+)?$")
    id: Words = Field(alias="@id")
    author: Words
    role: str | None = None
    timestamp: datetime
    last_updated: datetime | None = None
    version: int
    tooling: str | None = None
    statements: tuple[Statement, ...] = Field(min_length=1)


def read_vex(path: Path, now: datetime | None = None) -> list[Statement]:
    """Read a document's statements.

    Raises:
        PolicyError: it is no OpenVEX document, too old to go by, or of the future.
    """
    try:
        with path.open("rb") as stream:
            document = _Document.model_validate(read_json(stream.read(_BOUNDS.bytes + 1), _BOUNDS))
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        wrong = [f"`{'.'.join(map(str, item['loc']))[:200]}`: {item['msg']}" for item in problems[:_MOST_SHOWN]]
        wrong += [f"and {len(problems) - _MOST_SHOWN} more"] * (len(problems) > _MOST_SHOWN)
        raise PolicyError(f"{path.name} is no OpenVEX document: {'; '.join(wrong)}") from error
    except (OSError, ValueError) as error:
        raise PolicyError(f"{path.name} is no OpenVEX document: {' '.join(str(error).split())}") from error
    said, now = _zoned(document.last_updated or document.timestamp), now or datetime.now(UTC)
    if now - said > timedelta(days=OLDEST_DAYS):
        raise PolicyError(f"{path.name} is of {said:%Y-%m-%d}, more than {OLDEST_DAYS} days old: look at it again")
    made = [
        _zoned(statement.last_updated or statement.timestamp or document.last_updated or document.timestamp)
        for statement in document.statements
    ]
    if max(said, *made) - now > _CLOCKS_APART:
        raise PolicyError(f"{path.name} is of {max(said, *made):%Y-%m-%d %H:%M} UTC, which is in the future")
    return [
        statement.model_copy(update={"author": document.author, "source": path.name, "made": when})
        for statement, when in zip(document.statements, made, strict=True)
    ]


def _zoned(time: datetime) -> datetime:
    """UTC, where the time names no zone; the first and the last day there is are not moved, which would overflow."""
    if time.tzinfo is None or time.year in {MINYEAR, MAXYEAR}:
        return time.replace(tzinfo=UTC)
    return time.astimezone(UTC)
