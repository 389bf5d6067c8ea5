"""The VEX that is attached to an image says what the scan gate acted on, and is read as any other OpenVEX document."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import pytest

from containers.errors import ScanError
from containers.scan.evidence import SEVERITIES, DatabaseUsed, OperatingSystem, ScanEvidence, TrivyBuild, Vulnerability
from containers.scan.scan_gate import Waived
from containers.scan.vex import read_vex
from containers.scan.vex_document import document, read_waived

IMAGE = f"pkg:oci/demo-awq@sha256:{'ab' * 32}"
NOW = datetime(2026, 11, 25, tzinfo=UTC)
FOUND = tuple(
    Vulnerability(
        id=f"CVE-2026-000{number}", package=name, installed="1.0", fixed=fixed, severity="LOW",
        purl=f"pkg:deb/debian/{name}@1.0",
    )
    for number, (name, fixed) in enumerate([("zlib", None), ("openssl", None), ("bash", "1.1"), ("glibc", None)])
)  # fmt: skip
WAIVED = (
    Waived("CVE-2026-0000", "LOW", "zlib", "vex", "the supplier", "component not present (debian.json)", None, None),
    Waived("CVE-2026-0001", "LOW", "openssl", "waiver", "ops", "not reachable", "2026-12-31", 36),
)


def evidence(*found: Vulnerability) -> ScanEvidence:
    return ScanEvidence(
        image_id="sha256:" + "ab" * 32, os=OperatingSystem(), scanned_at=datetime(2026, 11, 24, tzinfo=UTC),
        trivy=TrivyBuild(version="0.76.0", sha256="ab" * 32), database=DatabaseUsed(state="ok"), packages=3,
        sbom_components=3, counts=dict.fromkeys(SEVERITIES, 0), fixable=dict.fromkeys(SEVERITIES, 0),
        vulnerabilities=found,
    )  # fmt: skip


def test_each_finding_has_the_status_that_the_gate_acted_on(tmp_path: Path) -> None:
    told = document(evidence(*FOUND), WAIVED, IMAGE)
    (tmp_path / "vex.json").write_text(json.dumps(told))
    statements = read_vex(tmp_path / "vex.json", NOW)
    assert [each.status for each in statements] == ["not_affected", "affected", "affected", "under_investigation"]
    assert statements[0].clears
    assert statements[0].covers(FOUND[0], IMAGE)
    assert not statements[0].covers(FOUND[1], IMAGE)
    assert statements[1].action_statement == "allowed until 2026-12-31 by ops: not reachable"
    assert statements[2].action_statement == "update bash to 1.1"


def test_the_same_findings_give_the_same_document() -> None:
    one = document(evidence(*FOUND), WAIVED, IMAGE)
    assert one == document(evidence(*FOUND), WAIVED, IMAGE)
    assert one is not None
    other = document(evidence(*FOUND), WAIVED, "pkg:oci/other")
    assert other is not None
    assert one["@id"] != other["@id"]


def test_where_nothing_was_found_there_is_no_document() -> None:
    assert document(evidence(), (), IMAGE) is None


def test_waived_findings_are_read_as_a_release_has_them() -> None:
    assert read_waived(json.dumps([asdict(each) for each in WAIVED]).encode()) == WAIVED
    with pytest.raises(ScanError, match=r"waived\.json: `0\.id`"):
        read_waived(b'[{"severity": "LOW"}]')
