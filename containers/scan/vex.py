"""OpenVEX documents: statements of a supplier, or our own, about vulnerabilities in a product, read strictly.

The format is OpenVEX 0.2.0 (openvex.dev). A ``not_affected`` statement must give a reason, as the specification
requires. The format has no expiry date, so a document older than `OLDEST_DAYS`, or dated in the future, is refused. Of
several statements about a finding, the latest counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import MAXYEAR, MINYEAR, UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from containers.errors import PolicyError
from containers.scan.evidence import Misconfiguration, Vulnerability
from containers.scan.purl import matches
from registry.bounded_json import Bounds, read_json

OLDEST_DAYS = 365
# An author's clock may be this far ahead of ours.
_CLOCK_SKEW = timedelta(hours=1)
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

    def names(self, purl: str | None) -> bool:
        """Return whether this names the package or image with that purl, by its id and by its identifiers.

        All of them must match: a component whose id is an image and whose identifier is a package is ambiguous.
        A component with hashes matches nothing, because scan findings have no hashes to compare with.
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
    """The status of one vulnerability in some products, with the reason."""

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
        """Whether the statement clears a finding."""
        return self.status in {"not_affected", "fixed"}

    @property
    def reason(self) -> str:
        """The reason as text."""
        return self.impact_statement or (self.justification or self.status).replace("_", " ")

    def covers(self, finding: Vulnerability | Misconfiguration, image: str | None = None) -> bool:
        """Return whether the statement is about this vulnerability, by name or alias, in this package.

        A product with ``subcomponents`` is an image with packages in it; its purl must match ``image``.
        """
        if not isinstance(finding, Vulnerability):
            return False
        if finding.id not in {self.vulnerability.name, *self.vulnerability.aliases}:
            return False
        return any(
            any(part.names(finding.purl) for part in product.subcomponents) and product.names(image)
            if product.subcomponents
            else product.names(finding.purl)
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
        PolicyError: it is not a valid OpenVEX document, is too old, or is dated in the future.
    """
    try:
        with path.open("rb") as stream:
            document = _Document.model_validate(read_json(stream.read(_BOUNDS.bytes + 1), _BOUNDS))
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        wrong = [f"`{'.'.join(map(str, item['loc']))[:200]}`: {item['msg']}" for item in problems[:_MOST_SHOWN]]
        wrong += [f"and {len(problems) - _MOST_SHOWN} more"] * (len(problems) > _MOST_SHOWN)
        raise PolicyError(f"{path.name} is not a valid OpenVEX document: {'; '.join(wrong)}") from error
    except (OSError, ValueError) as error:
        raise PolicyError(f"{path.name} is not a valid OpenVEX document: {' '.join(str(error).split())}") from error
    dated, now = _zoned(document.last_updated or document.timestamp), now or datetime.now(UTC)
    if now - dated > timedelta(days=OLDEST_DAYS):
        raise PolicyError(
            f"{path.name} is dated {dated:%Y-%m-%d}, over {OLDEST_DAYS} days ago: review it and update its timestamp"
        )
    made = [
        _zoned(statement.last_updated or statement.timestamp or document.last_updated or document.timestamp)
        for statement in document.statements
    ]
    if max(dated, *made) - now > _CLOCK_SKEW:
        raise PolicyError(
            f"{path.name} is dated {max(dated, *made):%Y-%m-%d %H:%M} UTC, in the future: correct its timestamp"
        )
    return [
        statement.model_copy(update={"author": document.author, "source": path.name, "made": when})
        for statement, when in zip(document.statements, made, strict=True)
    ]


def _zoned(time: datetime) -> datetime:
    """Convert to UTC; a time without a zone is UTC. In the first and last year a conversion could overflow."""
    if time.tzinfo is None or time.year in {MINYEAR, MAXYEAR}:
        return time.replace(tzinfo=UTC)
    return time.astimezone(UTC)
