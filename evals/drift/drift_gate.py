"""The drift gate: how much did quantization lose, and is the loss certainly within the limits?

Non-inferiority, over paired answers: an upper confidence bound of the loss within the limit passes, a lower bound
beyond it fails, and anything between is inconclusive. Accuracy alone cannot tell a spoiled checkpoint from a
good one on a few thousand items; likelihood can. So a suite holds both.

Critical tasks must all pass, each at the full confidence: a bad model gets through no more often than through one of
them. Supporting tasks must not fail. Any of both fails the release, so failures share the error rate among them (Holm).
Advisory tasks are reported and decide nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from evals.drift.limits import NO_BASELINE, DriftLimits
from evals.drift.pairs import ChoicePairs, Comparison, Divergence, Drift, TextPairs, counted
from evals.drift.wording import accuracy_metrics, accuracy_words, likelihood_metrics, likelihood_words, remedy
from evals.statistics import paired, sequential
from evals.statistics.paired import Loss
from registry.verdict import Status, Verdict

GATE = "drift"
DIVERGENCE = "divergence"
ADAPTER = "adapter"
"""Begins the names of an adapter's metrics and limits, before its own."""
MINIMUM_DOCUMENTS = 30  # with fewer, the normal approximation of the interval over documents does not hold
SUSPICIOUS = 0.05  # quantization does not raise accuracy by so many points: something else changed
LENGTHS = (0.9, 1.1)  # of the length of FP16's answers; the band of the MLPerf inference rules


@dataclass(frozen=True)
class _Finding:
    """The result of one task; metrics and limits are named without the task."""

    status: Status
    reason: str
    cause: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    tier: str = "critical"

    @property
    def decides(self) -> bool:
        """Whether it decides the release: a supporting task with too few items does not stop it."""
        if self.tier == "advisory" or self.status == "pass":
            return False
        return self.tier == "critical" or self.status == "fail" or self.cause != "too-few-items"


def judge(drift: Drift, limits: DriftLimits, adapters: Iterable[str] = ()) -> Verdict:
    """Decide whether the candidate's loss is within ``limits``; pure, and nothing is rounded before it is compared.

    ``adapters`` are those that are served: each is judged like the model, by its own limits.

    Causes of an inconclusive verdict: ``suite-changed`` (the evidence answers other questions), ``engine-differs``,
    ``not-answered`` (a task without answers), ``baseline-incomplete``, ``baseline-at-chance``, ``too-few-items``,
    ``stopped-early``, ``suspicious`` (much better than FP16), ``calibration-overlap``; several are joined by ``+``,
    sorted, so that accepting one accepts no other. A candidate without a finite answer to an item that the baseline
    answered fails. One that this machine can't serve is inconclusive (``unsupported``), which can't be accepted. Where
    there is no 16-bit original to compare with, that is the only cause (``no-baseline``).
    """
    if drift.uncompared is not None:
        named, told = _limits(limits), drift.uncompared
        nothing = Verdict(gate=GATE, status="inconclusive", cause=NO_BASELINE, reason=told, limits=named)
        return nothing.accepting(limits.accept_inconclusive)
    if drift.lacking is not None:
        return Verdict(
            gate=GATE, status="inconclusive", cause="unsupported", reason=drift.lacking, limits=_limits(limits)
        )
    findings = {**_tasks(drift, limits), **dict(_beside(drift, limits))}
    named = _limits(limits)
    for name in adapters:
        findings |= dict(_of_adapter(name, drift, limits))
        named |= {f"{ADAPTER}.{name}.{key}": value for key, value in _limits(limits.of_adapter(name)).items()}
    found = [finding for finding in findings.values() if finding.decides]
    status: Status = "inconclusive" if found else "pass"
    if any(finding.status == "fail" for finding in found):
        status = "fail"
    deciding = [finding for finding in found if finding.status == status] or [
        finding for finding in findings.values() if finding.status == "pass" and finding.tier != "advisory"
    ]
    reasons = [finding.reason for finding in deciding]
    if drift.not_computed:
        reasons.append(f"the loss of the weights alone, without {' and '.join(drift.not_computed)}")
    causes = sorted({finding.cause for finding in deciding if finding.cause})
    verdict = Verdict(
        gate=GATE,
        status=status,
        reason="; ".join(reasons),
        cause="+".join(causes) if status == "inconclusive" else None,
        metrics={f"{name}.{key}": value for name, each in findings.items() for key, value in each.metrics.items()},
        limits=named,
    )
    return verdict.accepting(limits.accept_inconclusive)


def is_clear(drift: Drift, limits: DriftLimits) -> bool:
    """Whether an interim analysis of a part of the suite decides: more items would not change the verdict."""
    verdict = judge(drift, limits)
    return verdict.status != "inconclusive" or not set((verdict.cause or "").split("+")) & {
        "too-few-items",
        "stopped-early",
    }


def _of_adapter(name: str, drift: Drift, limits: DriftLimits) -> Iterator[tuple[str, _Finding]]:
    """Yield what was found out about an adapter, under names that begin with its own."""
    own, found = limits.of_adapter(name), drift.adapters.get(name)
    if found is None:
        told = f"the adapter `{name}` was not evaluated"
        yield f"{ADAPTER}.{name}", _Finding("inconclusive", told, "not-answered")
        return
    for key, finding in {**_tasks(found, own), **dict(_beside(found, own))}.items():
        yield f"{ADAPTER}.{name}.{key}", replace(finding, reason=f"adapter `{name}`: {finding.reason}")


def _limits(limits: DriftLimits) -> dict[str, float]:
    named = {"confidence": limits.confidence}
    for name, task in limits.tasks.items():
        for key in ("max_drop", "max_increase"):
            value = getattr(task, key)
            if value is not None:
                named[f"{name}.{key}"] = value
    if limits.divergence is not None:
        named[f"{DIVERGENCE}.max_mean"] = limits.divergence.max_mean
    return named


def _tasks(drift: Comparison, limits: DriftLimits) -> dict[str, _Finding]:
    """Judge every task, each at the first interim analysis that decides it."""
    measured = {name: _measured(name, drift, limits) for name in limits.tasks}
    tests = [name for name, task in limits.tasks.items() if task.tier != "advisory"]
    tests += [DIVERGENCE] if limits.divergence is not None else []
    decisions: dict[str, tuple[Status, Loss]] = {}
    for fraction in limits.fractions:
        if fraction > drift.fraction + 1e-9:
            break
        share = fraction / drift.fraction  # of what was asked
        losses = {name: each.loss(share) for name, each in measured.items() if isinstance(each, _Measured)}
        if limits.divergence is not None and drift.divergence is not None:
            losses[DIVERGENCE] = _divergence_loss(drift.divergence, limits)
        for name, status in _decided(losses, tests, limits, fraction).items():
            if name not in decisions or decisions[name][0] == "inconclusive":
                decisions[name] = (status, losses[name])
    found = {}
    for name, each in measured.items():
        tier = limits.tasks[name].tier
        finding = _decided_finding(each, *decisions[name], drift, limits) if isinstance(each, _Measured) else each
        found[name] = _Finding(finding.status, finding.reason, finding.cause, finding.metrics, tier)
    if limits.divergence is not None:
        found[DIVERGENCE] = _divergence(drift.divergence, decisions.get(DIVERGENCE), limits)
    return found


def _decided(losses: Mapping[str, Loss], tests: list[str], limits: DriftLimits, fraction: float) -> dict[str, Status]:
    """Decide each task at one interim analysis: a pass at the error rate that it may spend, a failure at its share.

    Over all items the share is Holm's. At interim analyses it is an even one: Holm's steps would need all of them anew.
    """
    rate = paired.tail(limits.confidence)
    look = limits.fractions.index(fraction)
    within = sequential.levels(limits.fractions, rate)[look] if limits.looks > 1 else rate
    beyond = {name: losses[name].beyond for name in tests if name in losses}
    if limits.looks > 1:
        share = sequential.levels(limits.fractions, rate / max(1, len(tests)))[look]
        failed = {name for name, value in beyond.items() if value <= share}
    else:
        failed = {name for name, value in paired.holm(beyond).items() if value <= rate}
    # Over all items the reported bound decides; it is where `within` reaches the rate.
    passed = {
        name
        for name, loss in losses.items()
        if (loss.within <= within if limits.looks > 1 else loss.interval.upper <= _limit(name, limits))
    }
    return {name: "fail" if name in failed else "pass" if name in passed else "inconclusive" for name in losses}


def _limit(name: str, limits: DriftLimits) -> float:
    if name == DIVERGENCE and limits.divergence is not None:
        return limits.divergence.max_mean
    task = limits.tasks[name]
    return next(value for value in (task.max_drop, task.max_increase) if value is not None)


@dataclass(frozen=True)
class _Measured:
    """A task that can be judged: its pairs, and its limit."""

    name: str
    pairs: ChoicePairs | TextPairs
    limit: float
    confidence: float

    def loss(self, fraction: float) -> Loss:
        """The loss over the first share of the items that were asked."""
        if isinstance(self.pairs, ChoicePairs):
            groups = counted(self.pairs, self.part(self.pairs.items, fraction))
            return paired.clustered_drop_loss(groups, self.limit, self.confidence)
        documents = self.pairs.documents[: self.part(len(self.pairs.documents), fraction)]
        baseline, candidate = zip(*((each.baseline_nats, each.candidate_nats) for each in documents), strict=True)
        return paired.increase_loss(baseline, candidate, self.limit, self.confidence)

    def part(self, items: int, fraction: float) -> int:
        """How many of the items that were asked belong to this share of them."""
        return items if fraction >= 1 else min(items, max(2, round(items * fraction)))


def _measured(name: str, drift: Comparison, limits: DriftLimits) -> _Measured | _Finding:
    """Return a task's pairs if they can be judged, otherwise the reason why not."""
    pairs, task = drift.tasks.get(name), limits.tasks[name]
    if pairs is None:
        return _Finding("inconclusive", f"`{name}` was not answered", "not-answered")
    limit = task.max_drop if isinstance(pairs, ChoicePairs) else task.max_increase
    if limit is None:
        wanted = "accuracy (`max_drop`)" if task.max_drop is not None else "likelihood (`max_increase`)"
        return _Finding(
            "inconclusive",
            f"the answers to `{name}` are not of the kind that its limit needs: {wanted}",
            "not-answered",
        )
    answered = pairs.items if isinstance(pairs, ChoicePairs) else len(pairs.documents)
    return (
        _incomplete(name, pairs, answered)
        or _blind(name, pairs, limits.confidence)
        or _Measured(name, pairs, limit, limits.confidence)
    )


def _incomplete(name: str, pairs: ChoicePairs | TextPairs, answered: int) -> _Finding | None:
    """Say that items are missing; None where both models answered all of them."""
    missing = {"baseline_missing": float(pairs.baseline_missing), "candidate_missing": float(pairs.candidate_missing)}
    metrics = {"items": float(answered), **missing}
    if pairs.candidate_missing > 0 and pairs.baseline_missing == 0:
        reason = f"the candidate gave no finite answer to {pairs.candidate_missing} items of `{name}`"
        return _Finding("fail", reason, metrics=metrics)
    if pairs.baseline_missing:
        reason = f"the baseline gave no finite answer to {pairs.baseline_missing} items of `{name}`"
        return _Finding("inconclusive", reason, "baseline-incomplete", metrics)
    if answered == 0:
        return _Finding("inconclusive", f"`{name}` was not answered", "not-answered", metrics)
    return None


def _blind(name: str, pairs: ChoicePairs | TextPairs, confidence: float) -> _Finding | None:
    """Say why a task could not show a loss, however large; None if it could."""
    if isinstance(pairs, TextPairs):
        documents = pairs.documents
        if len(documents) >= MINIMUM_DOCUMENTS and sum(each.baseline_nats for each in documents) > 0:
            return None
        told = (
            f"`{name}` has {len(documents)} documents; an interval needs {MINIMUM_DOCUMENTS} with a likelihood below 1"
        )
        return _Finding("inconclusive", told, "too-few-items", {"items": float(len(documents))})
    share = paired.share_interval(pairs.baseline_right, pairs.items, confidence)
    if share.lower > pairs.chance:
        return None
    told = f"the baseline answers `{name}` no better than chance ({share.estimate:.2%}), so a loss can't be measured"
    metrics = {"items": float(pairs.items), "baseline_accuracy": share.estimate}
    return _Finding("inconclusive", told, "baseline-at-chance", metrics)


def _decided_finding(task: _Measured, status: Status, loss: Loss, drift: Comparison, limits: DriftLimits) -> _Finding:
    """Return a decision with its reason and metrics."""
    pairs = task.pairs
    if isinstance(pairs, ChoicePairs):
        metrics = accuracy_metrics(pairs, loss, limits.confidence)
        words = accuracy_words(task.name, pairs, loss, task.limit, limits.confidence)
    else:
        metrics = likelihood_metrics(pairs, loss, limits.confidence)
        words = likelihood_words(task.name, pairs, loss, task.limit, limits.confidence)
    if isinstance(pairs, ChoicePairs) and -loss.interval.estimate > SUSPICIOUS and status != "fail":
        told = f"{words}: suspicious; quantization alone does not raise accuracy so much: find another cause"
        return _Finding("inconclusive", told, "suspicious", metrics)
    if status != "inconclusive":
        return _Finding(status, f"{words}: {status}", None, metrics)
    early = drift.fraction < 1
    more = "; only a part of the items was asked" if early else remedy(loss, task.limit, int(metrics["items"]))
    cause = "stopped-early" if early else "too-few-items"
    return _Finding("inconclusive", f"{words}: inconclusive{more}", cause, metrics)


def _divergence_loss(found: Divergence, limits: DriftLimits) -> Loss:
    assert limits.divergence is not None  # noqa: S101 - the caller looked
    sums, counts = zip(*found.documents, strict=True)
    return paired.mean_loss(sums, counts, limits.divergence.max_mean, limits.confidence)


def _divergence(found: Divergence | None, decision: tuple[Status, Loss] | None, limits: DriftLimits) -> _Finding:
    """Judge gross damage: a mean that is confidently above the ceiling fails, a missing one does not pass."""
    assert limits.divergence is not None  # noqa: S101 - the caller looked
    if found is None or decision is None:
        told = "the two models' next-token distributions were not compared"
        return _Finding("inconclusive", told, "not-answered")
    status, loss = decision
    metrics = {
        "mean": found.mean,
        "mean_lower": loss.interval.lower,
        "mean_upper": loss.interval.upper,
        "p99": found.p99,
        "agreement": found.agreement,
        "covered": found.covered,
        "positions": float(sum(count for _, count in found.documents)),
    }
    words = (
        f"next-token distributions are {found.mean:.4f} nats from FP16's (p99 {found.p99:.3f},"
        f" {found.agreement:.1%} agree on the most likely token), {limits.divergence.max_mean:g} is the limit"
    )
    cause = "too-few-items" if status == "inconclusive" else None
    return _Finding(status, f"{words}: {status}", cause, metrics)


def _beside(drift: Comparison, limits: DriftLimits) -> Iterator[tuple[str, _Finding]]:
    """Yield problems of the comparison itself, independent of the tasks."""
    if drift.suite is None or drift.suite.digest != limits.digest:
        told = f"the evidence answers other questions than suite `{limits.name}` asks now: evaluate again"
        yield "suite", _Finding("inconclusive", told, "suite-changed")
    if drift.engine_differences:
        told = f"the two models were not evaluated by the same engine ({', '.join(drift.engine_differences)})"
        yield "engine", _Finding("inconclusive", told, "engine-differs")
    for name, pairs in drift.tasks.items():
        if name in limits.tasks and pairs.overlapping:
            told = (
                f"calibration text shares thirteen consecutive words with {len(pairs.overlapping)} items of `{name}`"
                f" (`{pairs.overlapping[0]}` …): calibrate with other text"
            )
            metrics = {"items": float(len(pairs.overlapping))}
            yield f"overlap.{name}", _Finding("inconclusive", told, "calibration-overlap", metrics)
        ratio = pairs.length_ratio if isinstance(pairs, ChoicePairs) else None
        if name in limits.tasks and ratio is not None and not LENGTHS[0] <= ratio <= LENGTHS[1]:
            told = f"answers to `{name}` are {ratio:.2f} times as long as FP16's"
            band = f"{LENGTHS[0]} to {LENGTHS[1]} is allowed"
            yield f"length.{name}", _Finding("fail", f"{told}; {band}", tier=limits.tasks[name].tier)
