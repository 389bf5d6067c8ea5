"""The scan's policy: what is refused when it is read, and which findings waivers and VEX documents allow."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from containers.errors import PolicyError
from containers.scan import policy
from containers.scan.evidence import (
    SEVERITIES,
    DatabaseUsed,
    Misconfiguration,
    OperatingSystem,
    ScanEvidence,
    Severity,
    TrivyBuild,
    Vulnerability,
)
from containers.scan.policy import ScanPolicy, Waiver
from containers.scan.purl import matches
from containers.scan.scan_gate import judge, waived, warnings
from containers.scan.vex import read_vex

TODAY = datetime.now(UTC).date()
IMAGE = f"pkg:oci/demo-awq@sha256:{'ab' * 32}"
OPENSSL = "pkg:deb/debian/openssl@3.0.15?arch=amd64&distro=debian-12"


def day(offset: int) -> str:
    return (TODAY + timedelta(days=offset)).isoformat()


def waiver(expires: int = 30, **changes: object) -> dict[str, object]:
    return {
        "id": "CVE-2099-0001", "owner": "jane@example.org", "reason": "not reachable", "expires": day(expires),
        **changes,
    }  # fmt: skip


def finding(severity: Severity = "CRITICAL", package: str = "openssl", purl: str = OPENSSL) -> Vulnerability:
    return Vulnerability(
        id="CVE-2099-0001", package=package, installed="3.0.15", fixed="3.0.16", severity=severity, purl=purl
    )


def evidence(
    *found: Vulnerability, misconfigurations: tuple[Misconfiguration, ...] = (), purl: str | None = IMAGE
) -> ScanEvidence:
    now = datetime.now(UTC)
    return ScanEvidence(
        image_id="sha256:" + "ab" * 32,
        os=OperatingSystem(family="debian", name="12"),
        scanned_at=now,
        trivy=TrivyBuild(version="0.76.0", sha256="ab" * 32),
        database=DatabaseUsed(state="ok", updated_at=now.isoformat()),
        packages=3,
        sbom_components=4,
        counts={severity: sum(item.severity == severity for item in found) for severity in SEVERITIES},
        fixable=dict.fromkeys(SEVERITIES, 0),
        vulnerabilities=found,
        misconfigurations=misconfigurations,
        purl=purl,
    )


def under(*waivers: dict[str, object], **rest: object) -> ScanPolicy:
    return ScanPolicy.model_validate({"waivers": waivers, **rest})


def test_the_committed_policy_is_whole() -> None:
    assert policy.read_common().fail_on == {"CRITICAL", "HIGH"}
    assert ScanPolicy().max_database_age_hours == 48


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expires": None}, "expires"),
        ({"expire": "2026-01-01"}, "expire"),
        ({"expires": day(policy.LONGEST_WAIVER_DAYS + 1)}, "expire within 90 days"),
        ({"expires": f"{day(3)}T12:00:00"}, "expected a date"),
        ({"owner": ""}, "owner"),
        ({"reason": "  "}, "reason"),
        ({"id": ""}, "id"),
        ({"pakage": "openssl"}, "pakage"),
    ],
)
def test_a_waiver_that_lacks_something_or_is_misspelt_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        under({**waiver(), **changes})


@pytest.mark.parametrize("key", ["id", "owner", "reason", "expires"])
def test_every_key_of_a_waiver_must_be_there(key: str) -> None:
    left = {name: value for name, value in waiver().items() if name != key}
    with pytest.raises(ValidationError, match=key):
        under(left)


@pytest.mark.parametrize(
    "text", ["fail_onn: []", "waivers: [{id: x}]", "[1]", "a: [", "", "a: 2026-11-31", "a: " + "[" * 5000]
)
def test_a_wrong_policy_file_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(PolicyError, match=r"policy\.yaml is not a valid scan policy") as caught:
        policy.read_common(tmp_path / "policy.yaml")
    assert "\n" not in str(caught.value)


def test_a_finding_is_waived_to_the_end_of_the_day_and_counts_from_the_next() -> None:
    found, allowed = evidence(finding()), under(waiver(1))
    assert judge(found, ScanPolicy()).status == "fail"
    verdict = judge(found, allowed)
    assert verdict.status == "pass"
    assert f"1 waived: CVE-2099-0001 in openssl until {day(1)} (jane@example.org)" in verdict.reason
    assert verdict.metrics["findings_waived"] == 1
    tomorrow, after = (datetime.now(UTC) + timedelta(days=days) for days in (1, 2))
    assert judge(found, allowed, now=tomorrow).status == "pass"
    over = judge(found, allowed, now=after)
    assert over.status == "fail"
    assert f"the waiver of CVE-2099-0001 expired on {day(1)}" in over.reason


def test_the_same_evidence_is_judged_alike_today_and_tomorrow_while_a_waiver_holds() -> None:
    """A verdict that counted days would seal, and promote, another release every day."""
    found, allowed = evidence(finding()), under(waiver(20))
    now = datetime.now(UTC)
    first, second = (judge(found, allowed, now=now + timedelta(hours=hours)) for hours in (0, 24))
    assert first.reason == second.reason


def test_what_was_waived_is_listed_with_the_days_left() -> None:
    (item,) = waived(evidence(finding()), under(waiver(5)))
    assert (item.id, item.owner, item.expires, item.days_left, item.by) == (
        "CVE-2099-0001", "jane@example.org", day(5), 5, "waiver",
    )  # fmt: skip
    assert waived(evidence(finding(severity="LOW")), under(waiver(5))) == []


def test_a_waiver_that_ends_soon_or_covers_nothing_warns() -> None:
    (line,) = warnings(evidence(finding()), under(waiver(1)))
    assert line == f"the waiver of CVE-2099-0001 in openssl expires in 1 days, on {day(1)} (jane@example.org)"
    assert warnings(evidence(finding()), under(waiver(policy.WARN_DAYS + 1))) == []
    assert warnings(evidence(), under(waiver())) == ["the waiver of CVE-2099-0001 matches no finding: remove it"]


@pytest.mark.parametrize(
    ("package", "covered"),
    [
        ("openssl", True), ("libssl3", False), ("pkg:deb/debian/openssl", True),
        ("pkg:deb/debian/openssl@3.0.15", True),
        ("pkg:deb/debian/openssl@3.0.14", False), ("pkg:deb/debian/openssl?distro=debian-12", True),
        ("pkg:deb/debian/openssl?distro=debian-11", False), ("pkg:pypi/openssl", False),
    ],
)  # fmt: skip
def test_a_waiver_may_be_for_one_package_alone(package: str, *, covered: bool) -> None:
    assert Waiver.model_validate(waiver(package=package)).covers(finding()) == covered


def test_a_misconfiguration_is_waived_by_its_id() -> None:
    root = Misconfiguration(id="DS-0002", severity="HIGH", title="root", target="image")
    found = evidence(misconfigurations=(root,))
    assert judge(found, ScanPolicy()).status == "fail"
    assert judge(found, under(waiver(id="DS-0002"))).status == "pass"


def test_python_names_are_compared_as_python_does() -> None:
    assert matches("pkg:pypi/Flask_Login", "pkg:pypi/flask-login@1.0")
    assert matches("pkg:npm/%40scope/name@1", "pkg:npm/%40scope/name@1")
    assert not matches("pkg:pypi/idna", None)


def vex(folder: Path, **changes: object) -> Path:
    statement = {
        "vulnerability": {"name": "CVE-2099-0001"}, "products": [{"@id": "pkg:deb/debian/openssl"}],
        "status": "not_affected", "justification": "vulnerable_code_not_in_execute_path",
    }  # fmt: skip
    document = {
        "@context": "https://openvex.dev/ns/v0.2.0", "@id": "https://example.org/vex/1", "author": "Example",
        "timestamp": datetime.now(UTC).isoformat(), "version": 1,
    }  # fmt: skip
    for key, value in changes.items():
        name = {"context": "@context"}.get(key, key)
        (document if name in document else statement)[name] = value  # type: ignore[assignment]
    path = folder / "some.openvex.json"
    path.write_text(json.dumps({**document, "statements": [statement]}))
    return path


def test_a_vex_statement_takes_a_finding_away_and_is_listed(tmp_path: Path) -> None:
    allowed = ScanPolicy(vex=(vex(tmp_path),))
    assert judge(evidence(finding()), allowed).status == "pass"
    (item,) = waived(evidence(finding()), allowed)
    assert (item.by, item.owner, item.expires) == ("vex", "Example", None)
    assert "vulnerable code not in execute path" in item.reason
    assert judge(evidence(finding(package="libssl3", purl="pkg:deb/debian/libssl3@3")), allowed).status == "fail"


@pytest.mark.parametrize(
    ("product", "cleared"),
    [("pkg:oci/demo-awq", True), (IMAGE, True), ("pkg:oci/another", False), ("pkg:oci/demo-awq@sha256:0", False)],
)
def test_a_statement_about_packages_in_an_image_is_about_that_image_alone(
    tmp_path: Path, product: str, *, cleared: bool
) -> None:
    products = [{"@id": product, "subcomponents": [{"@id": "pkg:deb/debian/openssl"}]}]
    allowed = ScanPolicy(vex=(vex(tmp_path, products=products),))
    assert judge(evidence(finding()), allowed).status == ("pass" if cleared else "fail")
    assert judge(evidence(finding(), purl=None), allowed).status == "fail"


PACKAGE = "pkg:deb/debian/openssl"


@pytest.mark.parametrize(
    ("product", "cleared"),
    [
        ({"@id": PACKAGE, "identifiers": {"purl": PACKAGE}}, True),
        ({"@id": PACKAGE, "identifiers": {"cpe23": "cpe:2.3:a:openssl:openssl:*:*:*:*:*:*:*:*"}}, True),
        ({"@id": "pkg:oci/another", "identifiers": {"purl": PACKAGE}}, False),
        ({"@id": "registry.example.com/another:1", "identifiers": {"purl": PACKAGE}}, False),
        ({"@id": PACKAGE, "identifiers": {"purl": "pkg:oci/another"}}, False),
        ({"@id": "https://example.com/another"}, False),
        ({"@id": PACKAGE, "hashes": {"sha-256": "0" * 64}}, False),
        ({"@id": IMAGE, "subcomponents": [{"@id": "another", "identifiers": {"purl": PACKAGE}}]}, False),
    ],
)
def test_a_statement_counts_where_all_that_names_its_product_names_what_was_found(
    tmp_path: Path, product: dict[str, object], *, cleared: bool
) -> None:
    allowed = ScanPolicy(vex=(vex(tmp_path, products=[product]),))
    assert judge(evidence(finding()), allowed).status == ("pass" if cleared else "fail")


@pytest.mark.parametrize("hours", [0, 1])
def test_what_was_said_last_counts(tmp_path: Path, hours: int) -> None:
    """Of two statements of one time, the one that clears nothing."""
    (tmp_path / "later").mkdir()
    now = datetime.now(UTC)
    cleared = vex(tmp_path, timestamp=(now - timedelta(hours=2)).isoformat())
    taken_back = vex(
        tmp_path / "later", timestamp=(now - timedelta(hours=2 - hours)).isoformat(),
        status="affected", justification=None, action_statement="update",
    )  # fmt: skip
    assert judge(evidence(finding()), ScanPolicy(vex=(cleared,))).status == "pass"
    for both in ((cleared, taken_back), (taken_back, cleared)):
        assert judge(evidence(finding()), ScanPolicy(vex=both)).status == "fail"
    again = vex(tmp_path, timestamp=now.isoformat())
    assert judge(evidence(finding()), ScanPolicy(vex=(taken_back, again))).status == "pass"


@pytest.mark.parametrize("status", ["under_investigation", "affected"])
def test_a_vex_statement_that_clears_nothing_changes_nothing(tmp_path: Path, status: str) -> None:
    path = vex(tmp_path, status=status, justification=None, action_statement="update")
    assert judge(evidence(finding()), ScanPolicy(vex=(path,))).status == "fail"


@pytest.mark.parametrize(
    "changes",
    [
        {"justification": None}, {"status": "not-affected"}, {"justifcation": "x"}, {"context": "https://other/"},
        {"timestamp": "2020-01-01T00:00:00Z"}, {"timestamp": "2999-01-01T00:00:00Z"}, {"products": []},
        {"justification": "because"},
    ],
)  # fmt: skip
def test_a_wrong_or_old_vex_document_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    path = vex(tmp_path, **changes)
    with pytest.raises(PolicyError, match=r"some\.openvex\.json"):
        read_vex(path)
    with pytest.raises(ValidationError, match="openvex"):
        ScanPolicy(vex=(path,))


@pytest.mark.parametrize(
    "text",
    [
        '{"statements": ' + "[" * 50_000 + "]" * 50_000 + "}",
        '{"statements": [' + "[]," * 600_000 + "[]]}",
        '{"statements": [' + "{}," * 20_000 + "{}]}",
        "[" * 50_000,
        "9" * 5000,
        "\ud800",
    ],
    ids=["deep", "many", "many problems", "unclosed", "a long number", "no UTF-8"],
)
def test_an_endless_vex_document_is_refused_in_one_short_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "some.openvex.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(PolicyError, match=r"some\.openvex\.json") as caught:
        read_vex(path)
    assert len(str(caught.value)) < 2000
    assert "\n" not in str(caught.value)


def test_a_vex_document_of_the_first_day_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="days ago"):
        read_vex(vex(tmp_path, timestamp="0001-01-01T00:00:00+23:00"))


def test_a_day_is_whole_days() -> None:
    last = Waiver.model_validate(waiver(2))
    assert [last.days_left(TODAY + timedelta(days=each)) for each in (0, 2, 3)] == [2, 0, -1]
    assert isinstance(last.expires, date)
