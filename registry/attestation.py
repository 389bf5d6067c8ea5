"""Statements about a manifest in a container registry, for whoever admits, pulls or mounts what it names.

Each is an in-toto statement (v1) in a Sigstore bundle (v0.3), signed by the release key; its one subject is the digest
of an OCI manifest: an image, or an artifact with the weights. They are attached to it as OCI referrers, as cosign 3
does. There is no entry of a transparency log: the key is the trust, as for the release itself.

A release has

- a signature (`SIGNED`), whose predicate is empty;
- its provenance, its bills of materials and its VEX, as the world writes them;
- its verdicts (`VERDICTS`): `Verdicts`, the one statement that names the others, so that none can be taken away unseen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from registry.bounded_json import Bounds, DocumentError, read_json
from registry.digests import canonical_json, digest_json
from registry.errors import Problem, SigningError, VerificationError, first_problem
from registry.manifest import Digest, Name, Timestamp
from registry.policy import Policy
from registry.provenance import PREDICATE as PROVENANCE
from registry.provenance import STATEMENT
from registry.sigstore_bundle import open_bundle, payload_of
from registry.verdict import Verdict

SIGNED = "https://sigstore.dev/cosign/sign/v1"
CYCLONEDX = "https://cyclonedx.org/bom"
OPENVEX = "https://openvex.dev/ns"
VERDICTS = "urn:slipway:verdicts:v1"
KINDS = {
    SIGNED: "signature", PROVENANCE: "provenance", CYCLONEDX: "bill of materials", OPENVEX: "VEX", VERDICTS: "verdicts",
}  # fmt: skip
"""What a person calls a statement, by its predicate's type."""
# A bill of materials of a large image has some hundred thousand values.
_BOUNDS = Bounds(bytes=32 << 20, values=2_000_000)
_MOST_SHOWN = 3
_LONGEST_SHOWN = 200


class Scanned(BaseModel):
    """The scan for known vulnerabilities that a verdict rests on."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    at: Timestamp
    """When the image was scanned, UTC."""
    database_updated_at: str | None
    """When the vulnerability database was made."""


class Verdicts(BaseModel):
    """The predicate `urn:slipway:verdicts:v1`: what the gates of a release concluded about the subject."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_version: Literal["slipway.verdicts/v1"] = Field(default="slipway.verdicts/v1", alias="schema")
    """The format of this document."""
    release: Name
    """The release line, `MODEL-SCHEME`."""
    manifest_digest: Digest
    """The digest of the release's signed manifest."""
    image_digest: Digest
    """The digest of the image in which the release was tested."""
    sealed: Timestamp
    """When the release was sealed, UTC."""
    passed: bool
    """Whether no gate blocks: each passed, or is inconclusive for a cause that the model file accepts."""
    gates: Mapping[Name, Verdict]
    """Each gate's verdict by its name."""
    scan: Scanned
    """The scan that the scan gate's verdict rests on."""
    statements: Mapping[Name, Digest]
    """What else is attached to the subject: the SHA-256 of each predicate in canonical JSON, by its title."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if any(name != verdict.gate for name, verdict in self.gates.items()):
            raise ValueError("a gate has the verdict of another one")
        if self.passed == any(verdict.blocks for verdict in self.gates.values()):
            raise ValueError("`passed` contradicts the verdicts")
        return self

    def predicate(self) -> dict[str, object]:
        """Return it as JSON values."""
        return self.model_dump(mode="json", by_alias=True)


@dataclass(frozen=True)
class Attachment:
    """A bundle that is attached, and the type of predicate that the registry announces for it.

    ``lost`` says why the bundle could not be read.
    """

    announced: str
    bundle: bytes
    lost: str = ""


@dataclass(frozen=True)
class AttestedManifest:
    """A manifest whose statements a trusted key signed: who signed it, and what the gates concluded."""

    digest: str
    signer: str
    verdicts: Verdicts


def statement(digest: str, name: str, kind: str, predicate: Mapping[str, object]) -> bytes:
    """Return the statement about the manifest with this digest, with a predicate of this ``kind``."""
    algorithm, _, value = digest.partition(":")
    return canonical_json(
        {
            "_type": STATEMENT,
            "subject": [{"name": name, "digest": {algorithm: value}}],
            "predicateType": kind,
            "predicate": dict(predicate),
        }
    )


def verify_attached(
    digest: str, attached: Sequence[Attachment], policy: Policy, where: str, now: datetime | None = None
) -> AttestedManifest:
    """Check what is attached to the manifest with this digest against a policy; of several verdicts the latest count.

    What others attached is passed over.

    Raises:
        VerificationError: It has no signature or verdicts of a trusted signer, a statement that the verdicts name is
            missing, a gate blocks or is absent, or the release or its scan is too old. ``where`` names the manifest.
    """
    found, refused = _opened(digest, attached, policy)
    missing = [kind for kind in (SIGNED, VERDICTS) if kind not in found]
    if missing:
        raise VerificationError(where, [Problem(KINDS[kind], _why_missing(kind, refused)) for kind in missing])
    verdicts = max((_verdicts(each.predicate, where) for each in found[VERDICTS]), key=lambda each: each.scan.at)
    present = {digest_json(each.predicate) for statements in found.values() for each in statements}
    problems = [
        Problem(title, f"not attached as it was signed: {_why_missing('', refused)}")
        for title, expected in verdicts.statements.items()
        if expected not in present
    ]
    problems += policy.judge_gates(list(verdicts.gates.values()), verdicts.sealed, now)
    problems += policy.judge_scan(verdicts.scan.at, now)
    if problems:
        raise VerificationError(where, problems)
    return AttestedManifest(digest, found[SIGNED][0].signer, verdicts)


@dataclass(frozen=True)
class _Statement:
    signer: str
    predicate: Mapping[str, object]


def _opened(
    digest: str, attached: Sequence[Attachment], policy: Policy
) -> tuple[dict[str, list[_Statement]], list[tuple[str, str]]]:
    """What a trusted signer states of this manifest, by kind; and why the rest does not count, with its kind."""
    found: dict[str, list[_Statement]] = {}
    refused: list[tuple[str, str]] = []
    for each in attached:
        if each.lost:
            refused.append((each.announced, each.lost))
            continue
        try:
            signer, payload = open_bundle(each.bundle, policy.keys, policy.authorities, policy.revoked)
            kind, predicate = _read(payload, digest, each.announced)
        except SigningError as error:
            refused.append((each.announced or _claimed(each.bundle), str(error)))
        else:
            found.setdefault(kind, []).append(_Statement(signer, predicate))
    return found, refused


def _read(payload: bytes, digest: str, announced: str) -> tuple[str, Mapping[str, object]]:
    """The kind and the predicate of a statement about the manifest with this digest."""
    try:
        document = read_json(payload, _BOUNDS)
        subjects = {f"sha256:{each['digest']['sha256']}" for each in document["subject"]}
        kind, predicate = document["predicateType"], document["predicate"]
        is_statement = document["_type"] == STATEMENT and isinstance(kind, str) and isinstance(predicate, dict)
    except (DocumentError, KeyError, TypeError) as error:
        raise SigningError("the signed payload is not a statement about a manifest") from error
    if not is_statement:
        raise SigningError("the signed payload is not an in-toto statement")
    if digest not in subjects:
        of = ", ".join(sorted(subjects))[:_LONGEST_SHOWN]
        raise SigningError(f"it is of another image or artifact, {of}, and was attached to this one")
    if announced not in {"", kind}:
        raise SigningError(f"it is announced as `{announced[:_LONGEST_SHOWN]}` and is a `{kind[:_LONGEST_SHOWN]}`")
    return kind, predicate


def _claimed(bundle: bytes) -> str:
    """The kind that a statement which nobody trusted signed claims to have."""
    try:
        return str(read_json(payload_of(bundle), _BOUNDS)["predicateType"])
    except (DocumentError, KeyError, TypeError):
        return ""


def _why_missing(kind: str, refused: Sequence[tuple[str, str]]) -> str:
    reasons = sorted({why for claimed, why in refused if kind in {"", claimed}})
    return "; ".join(reasons[:_MOST_SHOWN]) or "none is attached: it was never signed, or was removed"


def _verdicts(predicate: Mapping[str, object], where: str) -> Verdicts:
    try:
        return Verdicts.model_validate(predicate)
    except ValidationError as error:
        raise VerificationError(where, [Problem("verdicts", first_problem(error))]) from error
