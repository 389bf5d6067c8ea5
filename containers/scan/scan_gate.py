"""The scan's verdict: from the evidence, the policy and the day it is, and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, Literal

from containers.scan.policy import SEVERITIES, WARN_DAYS, Cause, ScanPolicy, Waiver, today
from containers.scan.scan import BLIND, counted
from containers.scan.vex import Statement
from registry.verdict import Verdict

_NAMED = 5


@dataclass(frozen=True)
class Waived:
    """A finding that would fail and was let through: by whom, why, and how long still (None: for good)."""

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
        """The finding with its end, the same from one day to the next."""
        until = f"until {self.expires}" if self.expires else f"by {self.by}"
        return f"{self.id} in {self.package} {until} ({self.owner})"


def judge(
    evidence: Mapping[str, Any],
    policy: ScanPolicy,
    *,
    now: datetime | None = None,
    database_at: datetime | None = None,
) -> Verdict:
    """Decide from the evidence alone.

    ``now`` is the time by default. A waiver that has ended since the scan no longer holds, and a database that has got
    too old since proves nothing any more; ``database_at`` is when its age is looked at, where that is not now. The
    metric is its age at the scan: a verdict is the same from one day to the next while it holds.

    What was found fails whatever the database is; that nothing was found passes only with a database that is whole,
    fresh and knows the image's distribution and package kinds.
    """
    now = now or datetime.now(UTC)
    found = _Found.of(evidence, policy, now)
    metrics = found.metrics(evidence, _age_hours(evidence, datetime.fromisoformat(evidence["scanned_at"])))
    limits = {
        "vulnerabilities_counted": 0.0, "misconfigurations_counted": 0.0,
        "database_age_hours": policy.max_database_age_hours,
        **({"secrets_counted": 0.0} if policy.secrets == "fail" else {}),
    }  # fmt: skip
    forbidden = found.secrets if policy.secrets == "fail" else []
    words = [*_vulnerable_words(found.vulnerable), *_secret_words(forbidden), *_misconfiguration_words(found.wrong)]
    if words:
        words += [f"over since {waiver.expires}: the waiver of {waiver.id}" for waiver in found.ended]
        return Verdict(gate="scan", status="fail", reason="; ".join(words), metrics=metrics, limits=limits)
    doubt = _doubt(evidence, policy, _age_hours(evidence, database_at or now))
    if doubt is not None:
        cause, reason = doubt
        verdict = Verdict(
            gate="scan", status="inconclusive", cause=cause, reason=reason, metrics=metrics, limits=limits
        )
        return verdict.accepting({str(key): why for key, why in policy.accept_inconclusive.items()})
    let_through = [item.words for item in found.waived if item.by != "allowed secret"]
    allowed = len(found.waived) - len(let_through)
    reason = (
        f"{evidence['packages']} packages: {counted(evidence['counts'])}; no secret"
        f"{f' ({allowed} findings let through by name)' if allowed else ''}, no misconfiguration that counts"
    )
    reason = "; ".join([reason, *_end_of_life(evidence), *_first(let_through, "waived")])
    return Verdict(gate="scan", status="pass", reason=reason, metrics=metrics, limits=limits)


def waived(evidence: Mapping[str, Any], policy: ScanPolicy, *, now: datetime | None = None) -> list[Waived]:
    """Return what was let through in writing, as of ``now`` (today by default), soonest to end first."""
    items = _Found.of(evidence, policy, now).waived
    return sorted(items, key=lambda item: (item.expires or "9999", item.id, item.package))


def warnings(evidence: Mapping[str, Any], policy: ScanPolicy, *, now: datetime | None = None) -> list[str]:
    """Return a line for a system without support, every waiver that ends soon, and every one that covers nothing."""
    found = _Found.of(evidence, policy, now)
    lines = [
        f"the waiver of {item.id} in {item.package} ends in {item.days_left} days, on {item.expires} ({item.owner})"
        for item in found.waived
        if item.days_left is not None and item.days_left <= WARN_DAYS
    ]
    everything = [*evidence["vulnerabilities"], *evidence["misconfigurations"]]
    idle = [waiver for waiver in policy.waivers if not any(waiver.covers(item) for item in everything)]
    return [
        *_end_of_life(evidence),
        *lines,
        *(f"the waiver of {waiver.id} covers nothing that was found: remove it" for waiver in idle),
    ]


@dataclass(frozen=True)
class _Found:
    """What counts against the image, what was let through, and which waivers of it are over."""

    vulnerable: Sequence[Mapping[str, Any]]
    secrets: Sequence[Mapping[str, Any]]
    wrong: Sequence[Mapping[str, Any]]
    waived: Sequence[Waived]
    ended: Sequence[Waiver]

    @classmethod
    def of(cls, evidence: Mapping[str, Any], policy: ScanPolicy, now: datetime | None) -> _Found:
        """Sort the findings."""
        day = now.astimezone(UTC).date() if now else today()
        counts = [
            item
            for item in evidence["vulnerabilities"]
            if item["severity"] in policy.fail_on and (item["fixed"] or policy.unfixed == "fail")
        ]
        wrong = [item for item in evidence["misconfigurations"] if item["severity"] in policy.misconfigurations]
        statements, image = policy.statements, evidence.get("purl")
        through = {id(item): _let_through(item, policy, statements, day, image) for item in [*counts, *wrong]}
        secrets = [item for item in evidence["secrets"] if not any(each.covers(item) for each in policy.all_secrets)]
        ended = [
            waiver
            for waiver in policy.all_waivers
            if waiver.days_left(day) < 0
            and any(waiver.covers(item) for item in [*counts, *wrong] if through[id(item)] is None)
        ]
        return cls(
            vulnerable=[item for item in counts if through[id(item)] is None],
            secrets=secrets,
            wrong=[item for item in wrong if through[id(item)] is None],
            waived=[*filter(None, through.values()), *_allowed(evidence, policy)],
            ended=ended,
        )

    def metrics(self, evidence: Mapping[str, Any], age: float | None) -> dict[str, float]:
        """Count; what was not looked for is absent, not zero."""
        metrics = {
            **{f"vulnerabilities_{severity.lower()}": float(evidence["counts"][severity]) for severity in SEVERITIES},
            "vulnerabilities_counted": float(len(self.vulnerable)),
            "secrets_counted": float(len(self.secrets)),
            "secrets_allowed": float(sum(item.by == "allowed secret" for item in self.waived)),
            "misconfigurations_counted": float(len(self.wrong)),
            "findings_waived": float(sum(item.by != "allowed secret" for item in self.waived)),
            **({} if age is None else {"database_age_hours": age}),
        }
        if evidence["database"]["state"] in BLIND:
            return {name: value for name, value in metrics.items() if not name.startswith("vulnerabilities_")}
        return metrics


def _let_through(
    item: Mapping[str, Any], policy: ScanPolicy, statements: Sequence[Statement], day: date, image: str | None
) -> Waived | None:
    """Who lets a finding through on that day: the waiver that lasts longest, else what VEX said last."""
    common = (item["id"], item["severity"], str(item.get("package") or item.get("target")))
    holding = [waiver for waiver in policy.all_waivers if waiver.covers(item) and waiver.days_left(day) >= 0]
    if holding:
        waiver = max(holding, key=lambda each: each.expires)
        return Waived(*common, "waiver", waiver.owner, waiver.reason, waiver.expires.isoformat(), waiver.days_left(day))
    said = [statement for statement in statements if statement.covers(item, image)]
    # Of two that were made at once, the one that clears nothing.
    last = max(said, key=lambda statement: (statement.made, not statement.clears), default=None)
    if last is None or not last.clears:
        return None
    return Waived(*common, "vex", last.author, f"{last.reason} ({last.source})", None, None)


def _allowed(evidence: Mapping[str, Any], policy: ScanPolicy) -> list[Waived]:
    return [
        Waived(
            item["id"], item["severity"], str(item["target"]), "allowed secret", "policy", exception.reason, None, None
        )
        for item in evidence["secrets"]
        for exception in [next((each for each in policy.all_secrets if each.covers(item)), None)]
        if exception is not None
    ]


def _age_hours(evidence: Mapping[str, Any], until: datetime) -> float | None:
    updated = evidence["database"]["updated_at"]
    return None if updated is None else (until - datetime.fromisoformat(updated)).total_seconds() / 3600


def _end_of_life(evidence: Mapping[str, Any]) -> list[str]:
    """Say that the image's distribution gets no more fixes, where Trivy knows it."""
    system = evidence["os"]
    return [f"{system['family']} {system['name']} is past its end of life"] if system["end_of_life"] else []


def _doubt(evidence: Mapping[str, Any], policy: ScanPolicy, age: float | None) -> tuple[Cause, str] | None:
    """Say why the absence of findings proves nothing, as cause and reason."""
    database = evidence["database"]
    remedy = "`slipway doctor --fix` downloads one where a repository is configured"
    match database["state"]:
        case "absent":
            return (
                "database-absent",
                f"there is no vulnerability database, so no vulnerability was looked for: {remedy}",
            )
        case "damaged":
            return "database-damaged", f"the vulnerability database is damaged ({database['damage']}): {remedy}"
        case "empty":
            return "database-empty", f"the vulnerability database holds no advisories at all: {remedy}"
        case "incomplete":
            lacking = ", ".join(database["lacking"])
            return "database-incomplete", f"the vulnerability database holds no advisories for {lacking}: {remedy}"
    if age is None or age > policy.max_database_age_hours or age < -1:
        # Its date, not its age: where this is accepted, the reason is the same from one day to the next.
        shown = "of unknown age" if age is None else f"of {database['updated_at']}"
        return "database-stale", (
            f"the vulnerability database is {shown}, and may be {policy.max_database_age_hours:g} hours old: {remedy}"
        )
    return None


def _vulnerable_words(items: Sequence[Mapping[str, Any]]) -> list[str]:
    words = [
        f"{item['id']} {item['severity']} in {item['package']} {item['installed']} "
        + (f"(fixed in {item['fixed']})" if item["fixed"] else "(no fix)")
        for item in items
    ]
    return _first(words, "vulnerabilities that count")


def _secret_words(items: Sequence[Mapping[str, Any]]) -> list[str]:
    return _first([f"{item['id']} in {item['target']}:{item['line']}" for item in items], "secrets")


def _misconfiguration_words(items: Sequence[Mapping[str, Any]]) -> list[str]:
    return _first([f"{item['id']} {item['severity']} {item['title']}" for item in items], "misconfigurations")


def _first(words: Sequence[str], what: str) -> list[str]:
    if not words:
        return []
    more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
    return [f"{len(words)} {what}: {', '.join(words[:_NAMED])}{more}"]
