"""The scan gate: a verdict from the evidence, the policy and today's date alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Literal

from containers.scan.evidence import SEVERITIES, Misconfiguration, ScanEvidence, Secret, Vulnerability
from containers.scan.policy import WARN_DAYS, Cause, ScanPolicy, Waiver, today
from containers.scan.scan import counts_text
from containers.scan.vex import Statement
from registry.verdict import Verdict

# Findings that a reason names before it says how many more there are.
_NAMED = 5


@dataclass(frozen=True)
class Waived:
    """A finding that would fail the gate and was allowed: by whom, why, and until when (None: no end)."""

    id: str
    severity: str
    package: str
    by: Literal["waiver", "vex", "allowed secret"]
    owner: str
    reason: str
    expires: str | None
    days_left: int | None

    @property
    def words(self) -> str:
        """The finding and the end of its waiver; the text does not change from day to day."""
        until = f"until {self.expires}" if self.expires else f"by {self.by}"
        return f"{self.id} in {self.package} {until} ({self.owner})"


def judge(
    evidence: ScanEvidence,
    policy: ScanPolicy,
    *,
    now: datetime | None = None,
    database_at: datetime | None = None,
) -> Verdict:
    """Judge the evidence as of ``now`` (the current time by default).

    Waivers that have expired since the scan no longer hold. A database that has become too old since makes the verdict
    inconclusive; ``database_at`` is the time at which its age is checked, ``now`` by default. The metric is its age at
    the time of the scan, so that a verdict stays the same from day to day.

    Findings fail the gate whatever the state of the database. No findings pass only with a database that is complete,
    fresh, and covers the image's distribution and package kinds.
    """
    now = now or datetime.now(UTC)
    found = _Findings.of(evidence, policy, now)
    metrics = found.metrics(evidence)
    limits = {
        "vulnerabilities_counted": 0.0, "misconfigurations_counted": 0.0,
        "database_age_hours": policy.max_database_age_hours,
        **({"secrets_counted": 0.0} if policy.secrets == "fail" else {}),
    }  # fmt: skip
    forbidden = found.secrets if policy.secrets == "fail" else []
    words = [
        *_vulnerable_words(found.vulnerable),
        *_secret_words(forbidden),
        *_misconfiguration_words(found.misconfigured),
    ]
    if words:
        words += [f"the waiver of {waiver.id} expired on {waiver.expires}" for waiver in found.expired]
        return Verdict(gate="scan", status="fail", reason="; ".join(words), metrics=metrics, limits=limits)
    doubt = _doubt(evidence, policy, database_at or now)
    if doubt is not None:
        cause, reason = doubt
        verdict = Verdict(
            gate="scan", status="inconclusive", cause=cause, reason=reason, metrics=metrics, limits=limits
        )
        return verdict.accepting({str(key): why for key, why in policy.accept_inconclusive.items()})
    waived_words = [item.words for item in found.waived if item.by != "allowed secret"]
    allowed = len(found.waived) - len(waived_words)
    reason = (
        f"{evidence.packages} packages: {counts_text(evidence.counts)}; no secrets"
        f"{f' ({allowed} allowed by policy)' if allowed else ''}, no misconfigurations that count"
    )
    reason = "; ".join([reason, *_end_of_life(evidence), *_first(waived_words, "waived")])
    return Verdict(gate="scan", status="pass", reason=reason, metrics=metrics, limits=limits)


def waived(evidence: ScanEvidence, policy: ScanPolicy, *, now: datetime | None = None) -> list[Waived]:
    """Return the allowed findings as of ``now`` (the current time by default), the soonest to expire first."""
    items = _Findings.of(evidence, policy, now).waived
    return sorted(items, key=lambda item: (item.expires or "9999", item.id, item.package))


def warnings(evidence: ScanEvidence, policy: ScanPolicy, *, now: datetime | None = None) -> list[str]:
    """Return a line for a distribution past its end of life, each waiver that expires soon, and each unused waiver."""
    found = _Findings.of(evidence, policy, now)
    lines = [
        f"the waiver of {item.id} in {item.package} expires in {item.days_left} days, on {item.expires} ({item.owner})"
        for item in found.waived
        if item.days_left is not None and item.days_left <= WARN_DAYS
    ]
    findings: list[Vulnerability | Misconfiguration] = [*evidence.vulnerabilities, *evidence.misconfigurations]
    unused = [waiver for waiver in policy.waivers if not any(waiver.covers(item) for item in findings)]
    return [
        *_end_of_life(evidence),
        *lines,
        *(f"the waiver of {waiver.id} matches no finding: remove it" for waiver in unused),
    ]


@dataclass(frozen=True)
class _Findings:
    """The findings that count against the image, those that were allowed, and the expired waivers of the former."""

    vulnerable: Sequence[Vulnerability]
    secrets: Sequence[Secret]
    misconfigured: Sequence[Misconfiguration]
    waived: Sequence[Waived]
    expired: Sequence[Waiver]

    @classmethod
    def of(cls, evidence: ScanEvidence, policy: ScanPolicy, now: datetime | None) -> _Findings:
        """Sort the findings."""
        day = now.astimezone(UTC).date() if now else today()
        vulnerable = [
            item
            for item in evidence.vulnerabilities
            if item.severity in policy.fail_on and (item.fixed or policy.unfixed == "fail")
        ]
        misconfigured = [item for item in evidence.misconfigurations if item.severity in policy.misconfigurations]
        statements = policy.statements
        counting: list[Vulnerability | Misconfiguration] = [*vulnerable, *misconfigured]
        allowed = {id(item): _waived(item, policy, statements, day, evidence.purl) for item in counting}
        secrets = [item for item in evidence.secrets if not any(each.covers(item) for each in policy.all_secrets)]
        expired = [
            waiver
            for waiver in policy.all_waivers
            if waiver.days_left(day) < 0 and any(waiver.covers(item) for item in counting if allowed[id(item)] is None)
        ]
        return cls(
            vulnerable=[item for item in vulnerable if allowed[id(item)] is None],
            secrets=secrets,
            misconfigured=[item for item in misconfigured if allowed[id(item)] is None],
            waived=[*filter(None, allowed.values()), *_allowed_secrets(evidence, policy)],
            expired=expired,
        )

    def metrics(self, evidence: ScanEvidence) -> dict[str, float]:
        """Count the findings; a kind that was not searched for is absent, not zero."""
        age = evidence.database.age_hours(evidence.scanned_at)
        metrics = {
            **{f"vulnerabilities_{severity.lower()}": float(evidence.counts[severity]) for severity in SEVERITIES},
            "vulnerabilities_counted": float(len(self.vulnerable)),
            "secrets_counted": float(len(self.secrets)),
            "secrets_allowed": float(sum(item.by == "allowed secret" for item in self.waived)),
            "misconfigurations_counted": float(len(self.misconfigured)),
            "findings_waived": float(sum(item.by != "allowed secret" for item in self.waived)),
            **({} if age is None else {"database_age_hours": age}),
        }
        if evidence.database.is_blind:
            return {name: value for name, value in metrics.items() if not name.startswith("vulnerabilities_")}
        return metrics


def _waived(
    item: Vulnerability | Misconfiguration,
    policy: ScanPolicy,
    statements: Sequence[Statement],
    day: date,
    image: str | None,
) -> Waived | None:
    """Find what allows a finding on that day: the waiver that expires last, else the latest VEX statement."""
    common = (item.id, item.severity, item.place)
    holding = [waiver for waiver in policy.all_waivers if waiver.covers(item) and waiver.days_left(day) >= 0]
    if holding:
        waiver = max(holding, key=lambda each: each.expires)
        return Waived(*common, "waiver", waiver.owner, waiver.reason, waiver.expires.isoformat(), waiver.days_left(day))
    matching = [statement for statement in statements if statement.covers(item, image)]
    # Of two statements of the same time, the one that does not clear the finding counts.
    last = max(matching, key=lambda statement: (statement.made, not statement.clears), default=None)
    if last is None or not last.clears:
        return None
    return Waived(*common, "vex", last.author, f"{last.reason} ({last.source})", None, None)


def _allowed_secrets(evidence: ScanEvidence, policy: ScanPolicy) -> list[Waived]:
    return [
        Waived(item.id, item.severity, item.place, "allowed secret", "policy", exception.reason, None, None)
        for item in evidence.secrets
        for exception in [next((each for each in policy.all_secrets if each.covers(item)), None)]
        if exception is not None
    ]


def _end_of_life(evidence: ScanEvidence) -> list[str]:
    """Say that the image's distribution gets no more fixes, if Trivy knows so."""
    system = evidence.os
    return [f"{system.family} {system.name} is past its end of life"] if system.end_of_life else []


def _doubt(evidence: ScanEvidence, policy: ScanPolicy, at: datetime) -> tuple[Cause, str] | None:
    """Return why the absence of findings proves nothing, as cause and reason."""
    database = evidence.database
    remedy = "`slipway doctor --fix` downloads one if a repository is configured"
    match database.state:
        case "absent":
            return "database-absent", f"no vulnerability database, so vulnerabilities were not searched for: {remedy}"
        case "damaged":
            return "database-damaged", f"the vulnerability database is damaged ({database.damage}): {remedy}"
        case "empty":
            return "database-empty", f"the vulnerability database holds no advisories: {remedy}"
        case "incomplete":
            lacking = ", ".join(database.lacking)
            return "database-incomplete", f"the vulnerability database holds no advisories for {lacking}: {remedy}"
    age = database.age_hours(at)
    if age is None or age > policy.max_database_age_hours or age < -1:
        # Its date, not its age: if this cause is accepted, the reason stays the same from day to day.
        shown = "has no date" if age is None else f"is dated {database.updated_at}"
        return "database-stale", (
            f"the vulnerability database {shown}; the limit is {policy.max_database_age_hours:g} hours: {remedy}"
        )
    return None


def _vulnerable_words(items: Sequence[Vulnerability]) -> list[str]:
    words = [
        f"{item.id} {item.severity} in {item.package} {item.installed} "
        + (f"(fixed in {item.fixed})" if item.fixed else "(no fix)")
        for item in items
    ]
    return _first(words, "vulnerabilities that count")


def _secret_words(items: Sequence[Secret]) -> list[str]:
    return _first([f"{item.id} in {item.place}:{item.line}" for item in items], "secrets")


def _misconfiguration_words(items: Sequence[Misconfiguration]) -> list[str]:
    return _first([f"{item.id} {item.severity} {item.title}" for item in items], "misconfigurations")


def _first(words: Sequence[str], what: str) -> list[str]:
    if not words:
        return []
    more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
    return [f"{len(words)} {what}: {', '.join(words[:_NAMED])}{more}"]
