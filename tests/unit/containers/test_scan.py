"""The scan gate: what fails, what is inconclusive, and what passes."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from containers.errors import ScanError
from containers.scan import scan_gate
from containers.scan.evidence import ScanEvidence, Secret, Severity, read_scan, write_scan
from containers.scan.policy import AllowedSecret, ScanPolicy, common
from containers.scan.scan import _read_report, _summary, scan_key, summarize
from containers.scan.trivy_db import Database
from registry.verdict import Verdict

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
IMAGE = "sha256:" + "ab" * 32


def database(hours: float = 1.0, buckets: tuple[str, ...] = ("debian 12", "pip::x")) -> Database:
    built = NOW - timedelta(hours=hours)
    return Database(
        Path("trivy.db"),
        "sha256:db",
        built.isoformat(),
        (built + timedelta(hours=24)).isoformat(),
        (*buckets, "vulnerability"),
    )


def vulnerability(severity: str = "CRITICAL", fixed: str | None = "2.0", number: int = 1) -> dict[str, Any]:
    item = {
        "VulnerabilityID": f"CVE-2099-{number:04}",
        "PkgName": "openssl",
        "InstalledVersion": "1.0",
        "Severity": severity,
    }
    return item if fixed is None else {**item, "FixedVersion": fixed}


def evidence(
    *vulnerabilities: dict[str, Any],
    known: Database | None = None,
    secrets: tuple[dict[str, Any], ...] = (),
    wrong: tuple[dict[str, Any], ...] = (),
) -> ScanEvidence:
    report = {
        "SchemaVersion": 2,
        "Metadata": {"ImageID": IMAGE, "OS": {"Family": "debian", "Name": "12.8"}},
        "Results": [
            {"Class": "os-pkgs", "Type": "debian", "Vulnerabilities": list(vulnerabilities), "Packages": [{}, {}]},
            {"Class": "lang-pkgs", "Type": "python-pkg", "Packages": [{}]},
            {"Class": "secret", "Target": "/etc/key.pem", "Secrets": list(secrets)},
            {"Class": "config", "Target": "image", "Misconfigurations": list(wrong)},
        ],
    }
    return summarize(report, known or database(), NOW, components=3)


def judge(found: ScanEvidence, policy: ScanPolicy, now: datetime = NOW) -> Verdict:
    return scan_gate.judge(found, policy, now=now)


def test_a_clean_image_under_a_fresh_database_passes_and_says_what_was_looked_at() -> None:
    verdict = judge(evidence(), ScanPolicy())
    assert (verdict.status, verdict.cause) == ("pass", None)
    assert "3 packages" in verdict.reason
    assert verdict.metrics["vulnerabilities_counted"] == 0


@pytest.mark.parametrize("severity", ["CRITICAL", "HIGH"])
def test_a_grave_vulnerability_with_a_fix_fails_by_name(severity: str) -> None:
    verdict = judge(evidence(vulnerability(severity)), ScanPolicy())
    assert verdict.status == "fail"
    assert f"CVE-2099-0001 {severity} in openssl 1.0 (fixed in 2.0)" in verdict.reason


@pytest.mark.parametrize(
    ("severity", "fixed"), [("CRITICAL", None), ("MEDIUM", "2.0"), ("LOW", None), ("UNKNOWN", "2.0")]
)
def test_what_has_no_fix_or_is_not_grave_passes_by_default_and_is_counted(severity: str, fixed: str | None) -> None:
    verdict = judge(evidence(vulnerability(severity, fixed)), ScanPolicy())
    assert verdict.status == "pass"
    assert verdict.metrics[f"vulnerabilities_{severity.lower()}"] == 1


def test_what_has_no_fix_fails_where_the_policy_says_so() -> None:
    verdict = judge(evidence(vulnerability(fixed=None)), ScanPolicy(unfixed="fail"))
    assert (verdict.status, "(no fix)" in verdict.reason) == ("fail", True)


def test_many_findings_are_named_in_part_and_counted_in_full() -> None:
    verdict = judge(evidence(*(vulnerability(number=number) for number in range(8))), ScanPolicy())
    assert verdict.reason.startswith("8 vulnerabilities that count")
    assert verdict.reason.endswith("and 3 more")


@pytest.mark.parametrize("lacking", ["VulnerabilityID", "PkgName", "InstalledVersion"])
def test_a_finding_that_leaves_something_out_is_kept_counted_and_reported(lacking: str) -> None:
    found = evidence({key: value for key, value in vulnerability().items() if key != lacking})
    assert found.counts["CRITICAL"] == 1
    verdict = judge(found, ScanPolicy())
    assert verdict.status == "fail"
    assert "unknown" in verdict.reason


@pytest.mark.parametrize(
    ("stated", "counted"), [("NEGLIGIBLE", "UNKNOWN"), (None, "UNKNOWN"), ("critical", "CRITICAL")]
)
def test_a_severity_that_is_not_known_here_is_counted_as_unknown(stated: str | None, counted: Severity) -> None:
    found = evidence(vulnerability() | {"Severity": stated})
    assert found.counts[counted] == 1
    policy = ScanPolicy(fail_on=frozenset({"UNKNOWN", "CRITICAL"}))
    assert judge(found, policy).status == "fail"
    assert judge(evidence(secrets=({"Severity": stated, "Title": "a key"},)), policy).status == "fail"
    (misconfiguration,) = evidence(wrong=({"Severity": stated, "Title": "runs as root"},)).misconfigurations
    assert misconfiguration.severity == counted


def test_a_secret_fails_and_is_never_quoted() -> None:
    secret = {
        "RuleID": "private-key",
        "Severity": "LOW",
        "Title": "key",
        "StartLine": 3,
        "Match": "hunter2",
        "Code": {},
    }
    found = evidence(secrets=(secret,))
    assert "hunter2" not in found.model_dump_json()
    verdict = judge(found, ScanPolicy())
    assert (verdict.status, "private-key in /etc/key.pem:3" in verdict.reason) == ("fail", True)
    assert judge(found, ScanPolicy(secrets="ignore")).status == "pass"


def test_only_the_secret_that_is_allowed_by_rule_and_path_gets_through() -> None:
    allowed = AllowedSecret(id="private-key", path="/etc/*", reason="a test's own key")
    policy = ScanPolicy(allowed_secrets=(allowed,))
    verdict = judge(evidence(secrets=({"RuleID": "private-key"},)), policy)
    assert (verdict.status, verdict.metrics["secrets_allowed"]) == ("pass", 1)
    assert "1 allowed by policy" in verdict.reason
    assert judge(evidence(secrets=({"RuleID": "aws-access-key-id"},)), policy).status == "fail"
    assert not allowed.covers(Secret(id="private-key", severity="LOW", target="/srv/key.pem"))


def test_the_common_exceptions_have_their_reasons() -> None:
    assert all(exception.reason for exception in common().allowed_secrets)


def test_a_misconfiguration_fails_by_severity() -> None:
    root = {"ID": "DS-0002", "Severity": "HIGH", "Title": "root user", "Status": "FAIL"}
    assert judge(evidence(wrong=(root,)), ScanPolicy()).status == "fail"
    assert judge(evidence(wrong=({**root, "Severity": "LOW"},)), ScanPolicy()).status == "pass"


@pytest.mark.parametrize(
    ("known", "cause"),
    [
        (Database(Path("trivy.db")), "database-absent"),
        (Database(Path("trivy.db"), "sha256:x", damage="4096 bytes of 8192"), "database-damaged"),
        (database(buckets=()), "database-empty"),
        (database(buckets=("debian 11", "pip::x")), "database-incomplete"),
        (database(buckets=("debian 12",)), "database-incomplete"),
        (database(hours=48.01), "database-stale"),
        (database(hours=-2), "database-stale"),
    ],
)
def test_a_database_that_can_not_know_makes_a_clean_scan_inconclusive(known: Database, cause: str) -> None:
    verdict = judge(evidence(known=known), ScanPolicy())
    assert (verdict.status, verdict.cause, verdict.blocks) == ("inconclusive", cause, True)


def test_what_was_not_looked_for_is_no_metric() -> None:
    verdict = judge(evidence(known=Database(Path("trivy.db"))), ScanPolicy())
    assert not [name for name in verdict.metrics if name.startswith("vulnerabilities")]


def test_what_was_found_fails_even_under_a_stale_database() -> None:
    assert judge(evidence(vulnerability(), known=database(hours=99)), ScanPolicy()).status == "fail"


def test_only_the_cause_that_is_accepted_in_writing_gets_through() -> None:
    policy = ScanPolicy(accept_inconclusive={"database-absent": "no database can be had here"})
    verdict = judge(evidence(known=Database(Path("trivy.db"))), policy)
    assert (verdict.status, verdict.blocks) == ("inconclusive", False)
    assert verdict.accepted_because == "no database can be had here"
    assert judge(evidence(known=database(buckets=())), policy).blocks


def test_the_database_ages_after_the_scan() -> None:
    found = evidence(known=database(hours=1))
    assert judge(found, ScanPolicy()).status == "pass"
    assert judge(found, ScanPolicy(), now=NOW + timedelta(days=30)).cause == "database-stale"
    assert scan_gate.judge(evidence(known=database(hours=24 * 365)), ScanPolicy()).cause == "database-stale"


def test_a_verdict_is_the_same_whatever_the_hour_while_it_holds_and_once_it_does_not() -> None:
    """Another verdict is another release: it would be signed and promoted every day."""
    found = evidence(known=database(hours=1))
    assert judge(found, ScanPolicy()) == judge(found, ScanPolicy(), now=NOW + timedelta(hours=40))
    accepting = ScanPolicy(accept_inconclusive={"database-stale": "none comes here"})
    stale = [judge(found, accepting, now=NOW + timedelta(days=days)) for days in (30, 31)]
    assert stale[0] == stale[1]
    assert (stale[0].cause, stale[0].blocks) == ("database-stale", False)


def test_an_age_may_be_looked_at_as_it_was_at_the_scan() -> None:
    found = evidence(known=database(hours=1))
    later = NOW + timedelta(days=30)
    assert scan_gate.judge(found, ScanPolicy(), now=later, database_at=NOW) == judge(found, ScanPolicy())


def test_a_system_past_its_end_of_life_is_told() -> None:
    found = evidence()
    assert "end of life" not in judge(found, ScanPolicy()).reason
    found = found.model_copy(update={"os": found.os.model_copy(update={"end_of_life": True})})
    assert "debian 12.8 is past its end of life" in judge(found, ScanPolicy()).reason
    assert scan_gate.warnings(found, ScanPolicy()) == ["debian 12.8 is past its end of life"]


def test_the_age_limit_is_compared_unrounded() -> None:
    policy = ScanPolicy(max_database_age_hours=1)
    assert judge(evidence(known=database(hours=1)), policy).status == "pass"
    assert judge(evidence(known=database(hours=1.001)), policy).status == "inconclusive"


@pytest.mark.parametrize(
    "section",
    [
        {"fail_onn": ["HIGH"]},
        {"fail_on": ["SEVERE"]},
        {"accept_inconclusive": {"database-absnt": "why"}},
        {"accept_inconclusive": {"database-absent": ""}},
        {"max_database_age_hours": 0},
    ],
)
def test_a_misspelt_policy_is_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ScanPolicy.model_validate(section)


def test_another_database_is_another_scan() -> None:
    keys = [
        scan_key(IMAGE, known) for known in (database(), Database(Path("trivy.db")), Database(Path("t"), "sha256:2"))
    ]
    assert len({json.dumps(key) for key in keys}) == 3
    assert scan_key(IMAGE, database(hours=1)) == scan_key(IMAGE, database(hours=1))


def test_a_database_that_is_published_anew_makes_a_new_scan_whose_evidence_is_as_fresh() -> None:
    assert scan_key(IMAGE, database(hours=1)) != scan_key(IMAGE, database(hours=2))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "incomplete"),
        ('{"SchemaVersion": 2, "Metadata": {"Ima', "incomplete"),
        ("[]", "incomplete"),
        ('{"SchemaVersion": 2}', "incomplete"),
        ('{"SchemaVersion": 3, "Metadata": {"ImageID": "' + IMAGE + '"}}', "schema 3"),
        ('{"SchemaVersion": 2, "Metadata": {"ImageID": "sha256:other"}}', "sha256:other"),
    ],
)
def test_a_report_that_is_cut_off_or_about_something_else_is_an_error(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "trivy.json").write_text(text)
    with pytest.raises(ScanError, match=words):
        _read_report(tmp_path / "trivy.json", IMAGE)


def test_no_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ScanError, match="incomplete"):
        _read_report(tmp_path / "trivy.json", IMAGE)


def test_the_scans_last_line_counts_all_findings_and_leaves_it_to_the_gate_which_of_them_count() -> None:
    found = evidence(secrets=({"RuleID": "private-key"},), wrong=({"ID": "DS-0026", "Severity": "LOW"},))
    counted = "no vulnerabilities; secrets: 1; misconfigurations: 1 (the gate decides which of them count)"
    assert _summary(found) == f"3 packages in 0.0 s: {counted}"


def test_evidence_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = evidence(vulnerability(), secrets=({"RuleID": "private-key", "StartLine": 3},), wrong=({"ID": "DS-0002"},))
    write_scan(found, tmp_path)
    assert read_scan(tmp_path) == found
    document = json.loads((tmp_path / "scan.json").read_text())
    assert (document["schema"], document["scanned_at"]) == ("slipway/scan/1", NOW.isoformat())


# As the first release of slipway wrote it: without `purl` and with Trivy's own severities.
OLD = {
    "schema": "slipway/scan/1", "image_id": IMAGE, "repo_digests": [],
    "os": {"family": "debian", "name": "12.8", "end_of_life": False},
    "scanned_at": "2026-11-24T00:00:00+00:00", "trivy": {"version": "0.76.0", "sha256": "ab" * 32},
    "database": {
        "state": "ok", "lacking": [], "damage": None, "digest": "sha256:db",
        "updated_at": "2026-11-23T18:10:11.123456789Z", "next_update": "2026-11-24T18:10:11.123456789Z",
    },
    "packages": 261, "sbom_components": 262,
    "counts": {"CRITICAL": 0, "HIGH": 0, "MEDIUM": 0, "LOW": 0, "UNKNOWN": 1},
    "fixable": {"CRITICAL": 0, "HIGH": 0, "MEDIUM": 0, "LOW": 0, "UNKNOWN": 0},
    "vulnerabilities": [
        {"id": "CVE-2026-1", "package": "tar", "installed": "1.34", "fixed": None, "severity": "NEGLIGIBLE",
         "status": "affected", "title": None, "url": None, "purl": "pkg:deb/debian/tar@1.34"},
    ],
    "secrets": [], "misconfigurations": [], "seconds": 3.25,
}  # fmt: skip


def test_evidence_of_an_old_release_is_read(tmp_path: Path) -> None:
    (tmp_path / "scan.json").write_text(json.dumps(OLD))
    found = read_scan(tmp_path)
    assert (found.packages, found.purl, found.vulnerabilities[0].severity) == (261, None, "UNKNOWN")
    assert judge(found, ScanPolicy(), now=datetime(2026, 11, 24, tzinfo=UTC)).status == "pass"


@pytest.mark.parametrize("text", ["{", "{}", json.dumps({**OLD, "packages": -1}), json.dumps({**OLD, "purls": []})])
def test_evidence_that_is_damaged_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "scan.json").write_text(text)
    with pytest.raises(ScanError, match=r"scan\.json.*scan the image again"):
        read_scan(tmp_path)
