"""What is known of the vulnerabilities found in a release's image, as OpenVEX 0.2.0 (openvex.dev).

It says what the scan gate acted on: a finding that a VEX statement cleared does not affect the image; one that is
waived, or has a fixed version, affects it; any other is under investigation. It is made from the scan's evidence and
the list of waived findings by a pure function, and `containers.scan.vex` reads it.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence

from pydantic import TypeAdapter, ValidationError

from containers.errors import ScanError
from containers.scan.evidence import ScanEvidence, Vulnerability
from containers.scan.scan_gate import Waived
from registry.digests import digest_json
from registry.errors import first_problem

CONTEXT = "https://openvex.dev/ns/v0.2.0"
_WAIVED = TypeAdapter(tuple[Waived, ...])


def read_waived(data: bytes) -> tuple[Waived, ...]:
    """Read the findings that were waived, as a release has them (``waived.json``).

    Raises:
        ScanError: it is not such a list.
    """
    try:
        return _WAIVED.validate_json(data)
    except ValidationError as error:
        raise ScanError(f"waived.json: {first_problem(error)}") from error


def document(evidence: ScanEvidence, waived: Sequence[Waived], image: str) -> dict[str, object] | None:
    """Return the document about the image with the purl ``image``; None if nothing was found, which OpenVEX can't say.

    ``waived`` are the findings that the scan gate let through.
    """
    allowed = {(item.id, item.package): item for item in waived}
    statements = [
        {
            "vulnerability": {"name": found.id},
            "products": [{"@id": image, **_package(found)}],
            **dict(_status(found, allowed.get((found.id, found.place)))),
        }
        for found in evidence.vulnerabilities
    ]
    if not statements:
        return None
    told = {
        "@context": CONTEXT, "author": "slipway", "timestamp": f"{evidence.scanned_at:%Y-%m-%dT%H:%M:%SZ}",
        "version": 1, "statements": statements,
    }  # fmt: skip
    return {**told, "@id": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, digest_json(told))}"}


def _package(found: Vulnerability) -> Mapping[str, object]:
    return {} if found.purl is None else {"subcomponents": [{"@id": found.purl}]}


def _status(found: Vulnerability, allowed: Waived | None) -> Iterator[tuple[str, str]]:
    if allowed is not None and allowed.by == "vex":
        yield "status", "not_affected"
        yield "impact_statement", f"{allowed.owner}: {allowed.reason}"
    elif allowed is not None:
        yield "status", "affected"
        yield "action_statement", f"allowed until {allowed.expires} by {allowed.owner}: {allowed.reason}"
    elif found.fixed:
        yield "status", "affected"
        yield "action_statement", f"update {found.package} to {found.fixed}"
    else:
        yield "status", "under_investigation"
