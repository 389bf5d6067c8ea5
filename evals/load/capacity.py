"""The highest rate at which the service level still holds: bracketed, then bisected, with its uncertainty.

Nothing here sends a request: `search` is given a callable that loads the server at one rate and returns the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from evals.load.slo import DISTRIBUTIONS, PERCENTILES, Positive, met, percentile
from evals.statistics.trend import Queue, queue
from registry.progress import Progress

# Seconds of arrivals and rate → the rows of what became of the requests, and the client's own lateness at p95 in ms.
Load = Callable[[float, float], tuple[Sequence[Mapping[str, Any]], float]]
Status = Literal["holds", "misses", "saturated", "unclear"]

_RESAMPLES = 200
_BLOCKS = 10
# A step is at least so many times as long as an answer took: else an empty server only fills.
_ANSWERS_A_STEP = 8.0
# The rate is not halved below this share of the one to begin at: a server that holds the level at none would take days.
_LOWEST_SHARE = 1 / 32
# Throughput that falls to this share of its peak while more is asked for is a collapse.
_COLLAPSED = 0.85


class CapacitySearch(BaseModel):
    """How the capacity is searched for.

    The search ends when the rates that hold and that don't are close to each other and the one that holds held twice.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step_seconds: Positive = 20.0
    """Seconds of one step; longer where fewer than `min_requests` fit."""
    min_requests: Annotated[int, Field(ge=20)] = 100
    """Requests of one step, at least."""
    max_steps: Annotated[int, Field(ge=2, le=40)] = 12
    """Steps, at most."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """By what fraction the rates that hold and that don't may differ at the end."""
    max_rate: Positive | None = None
    """The highest rate that is tried."""

    def longest_step_s(self, start: float, answer_s: float) -> float:
        """The longest that a step of a search from the rate ``start`` takes, where an answer takes ``answer_s``."""
        lowest = _LOWEST_SHARE * min(start, self.max_rate or math.inf)
        return max(self.step_seconds, self.min_requests / lowest, _ANSWERS_A_STEP * answer_s)


@dataclass(frozen=True)
class Step:
    """What one rate gave. ``clear``: chance alone would hardly turn the answer round."""

    rate: float
    seconds: float
    requests: int
    status: Status
    clear: bool
    reason: str
    metrics: Mapping[str, float]
    queue: Queue
    client_late_ms: float

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "queue": self.queue.document()}


def search(
    settings: CapacitySearch,
    limits: Mapping[str, float],
    start: float,
    load: Load,
    *,
    max_client_late_ms: float,
    progress: Progress,
) -> dict[str, Any]:
    """Find the capacity and return the evidence: the rate, its interval, knee and collapse, and every step.

    Args:
        settings: how long steps are and when to end.
        limits: the service level: percentiles, error rate (what else stands there is not a matter of the rate).
        start: the rate to begin at, in requests a second.
        load: puts the server under a rate for so many seconds.
        max_client_late_ms: a client that is later than this at p95 makes a step unclear.
        progress: told what each step gave.
    """
    judged = {name: value for name, value in limits.items() if name.endswith("_ms") or name == "error_rate"}
    steps: list[Step] = []
    rate: float | None = start if settings.max_rate is None else min(start, settings.max_rate)
    longest = 0.0
    while rate is not None and len(steps) < settings.max_steps:
        seconds = max(settings.step_seconds, settings.min_requests / rate, longest)
        rows, late = load(rate, seconds)
        step = judge_step(rate, seconds, rows, judged, late, max_client_late_ms)
        if step.status == "holds" and "p50_latency_ms" in step.metrics:
            longest = max(longest, _ANSWERS_A_STEP * step.metrics["p50_latency_ms"] / 1000)
        steps.append(step)
        progress(f"{rate:.3g} requests/s: {step.reason}")
        rate = _next(steps, settings)
    return _conclude(steps, settings, limits)


def judge_step(
    rate: float,
    seconds: float,
    rows: Sequence[Mapping[str, Any]],
    limits: Mapping[str, float],
    client_late_ms: float,
    max_client_late_ms: float,
) -> Step:
    """Say whether a rate holds, misses a limit, saturates the server, or can't be told: it was not sent in time.

    A late client's traffic is of a lower rate. A server that was saturated by that is so at the full rate; nothing else
    is told by it, but for errors.
    """
    waiting = queue(rows, seconds)
    metrics = step_metrics(rows, seconds)
    missed = [name for name in limits if not met(name, metrics, limits)]

    def made(status: Status, reason: str, *, clear: bool) -> Step:
        return Step(rate, seconds, len(rows), status, clear, reason, metrics, waiting, client_late_ms)

    lost = sum("start_ms" not in row for row in rows)
    if lost:
        return made("unclear", f"the client did not send {lost} of {len(rows)} requests", clear=False)
    if waiting.growing:
        grown = f"the queue grew from {waiting.first:.1f} to {waiting.last:.1f} requests"
        return made("saturated", f"{grown}; it serves {waiting.served_per_second:.3g}/s", clear=True)
    if client_late_ms > max_client_late_ms and missed != ["error_rate"]:
        return made("unclear", f"the client itself was {client_late_ms:.0f} ms late at p95", clear=False)
    straddling = [name for name in limits if _straddles(name, rows, limits[name])]
    told = ", ".join(f"{name} {metrics[name]:,.4g}" for name in (missed or limits) if name in metrics)
    if missed:
        return made("misses", f"misses {told or ', '.join(missed)}", clear=bool(set(missed) - set(straddling)))
    return made("holds", f"holds, {told}", clear=not straddling)


def step_metrics(rows: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, float]:
    """Percentiles, error rate and throughput of a step; throughput counts what was answered while requests arrived."""
    good = [row for row in rows if row["error"] is None]
    metrics = {"error_rate": (len(rows) - len(good)) / len(rows) if rows else 1.0}
    for column in DISTRIBUTIONS:
        values = [float(row[column]) for row in good if row.get(column) is not None]
        if values:
            metrics |= {f"p{share}_{column}": percentile(values, share) for share in PERCENTILES}
    latencies = [float(row["latency_ms"]) for row in good]
    if latencies:
        metrics["mean_latency_ms"] = sum(latencies) / len(latencies)
    in_time = [row for row in good if row["end_ms"] <= seconds * 1000]
    metrics["requests_per_second"] = len(in_time) / seconds
    until = max((row["end_ms"] for row in good), default=0.0) / 1000
    metrics["drained_requests_per_second"] = len(good) / max(seconds, until)
    metrics["output_tokens_per_second"] = sum(row["output_tokens"] or 0 for row in in_time) / seconds
    return metrics


def _straddles(name: str, rows: Sequence[Mapping[str, Any]], limit: float) -> bool:
    """Whether the 90% interval of a percentile holds its limit, by a bootstrap over blocks of time.

    Requests that wait in one queue wait alike: resampling them one by one would take the interval too narrow, so whole
    tenths of the step are drawn (the block bootstrap, Künsch, Annals of Statistics 17:1217-1241, 1989).
    """
    share, _, column = name.removeprefix("p").partition("_")
    if column not in DISTRIBUTIONS or not share.isdecimal():
        return False
    values = np.array([row[column] for row in rows if row["error"] is None and row.get(column) is not None])
    if len(values) < 2 * _BLOCKS:
        return True
    blocks = np.array_split(values, _BLOCKS)
    chance = np.random.default_rng(0)
    draws = chance.integers(0, _BLOCKS, size=(_RESAMPLES, _BLOCKS))
    found = [
        np.percentile(np.concatenate([blocks[which] for which in draw]), int(share), method="inverted_cdf")
        for draw in draws
    ]
    low, high = np.percentile(found, [5, 95])
    return bool(low <= limit < high)


def _next(steps: Sequence[Step], settings: CapacitySearch) -> float | None:
    """The rate to try next, or None when the search is over: at the tolerance, the maximum, or the client's own end."""
    if steps[-1].status == "unclear":
        again = len(steps) < 2 or steps[-2].status != "unclear"
        return steps[-1].rate if again else None
    low, high = _bracket(steps)
    if low is None and steps[-1].rate <= _LOWEST_SHARE * steps[0].rate:
        return None
    if high is None:
        rate = min(2 * steps[-1].rate, settings.max_rate or math.inf)
        return rate if rate > steps[-1].rate else None
    return _within(steps, low, high, settings)


def _within(steps: Sequence[Step], low: float | None, high: float, settings: CapacitySearch) -> float | None:
    """Halve until one holds; then what the server served while saturated, once; then the geometric mean of the ends.

    Capacity can't be far below what a saturated server serves, so that saves steps. What is found is tried a second
    time: near capacity queues are long by chance, and the highest of several rates that held once held by luck.
    """
    served = max((_served(step) for step in steps if step.status == "saturated"), default=0.0)
    if low is None:
        return max(_LOWEST_SHARE * steps[0].rate, min(high / 2, 0.9 * served) if served else high / 2)
    if high / low <= 1 + settings.tolerance:
        return low if sum(step.rate == low for step in steps) == 1 else None
    guess = 0.95 * served
    tried = any(abs(step.rate / guess - 1) < settings.tolerance / 4 for step in steps) if guess else True
    return guess if not tried and 1.02 * low < guess < 0.98 * high else math.sqrt(low * high)


def _bracket(steps: Sequence[Step]) -> tuple[float | None, float | None]:
    """The highest rate that held below every failure, and the lowest that failed."""
    high = min((step.rate for step in steps if step.status in {"misses", "saturated"}), default=None)
    low = max(
        (step.rate for step in steps if step.status == "holds" and (high is None or step.rate < high)), default=None
    )
    return low, high


def _conclude(steps: Sequence[Step], settings: CapacitySearch, limits: Mapping[str, float]) -> dict[str, Any]:
    low, high = _bracket(steps)
    holding = next((step for step in steps if step.status == "holds" and step.rate == low), None)
    failed = [step for step in steps if step.status in {"misses", "saturated"}]
    saturated = [step.rate for step in steps if step.status == "saturated"]
    held = [step.rate for step in steps if step.status == "holds" and step.clear and step.rate <= (low or 0)]
    surely, surely_not = max(held, default=None), min((step.rate for step in failed if step.clear), default=None)
    return {
        "settings": settings.model_dump(),
        "limits": dict(limits),
        "requests_per_second": low,
        "output_tokens_per_second": holding.metrics["output_tokens_per_second"] if holding else None,
        "interval": [surely, surely_not],
        "first_failing": high,
        "saturated_from": min(saturated, default=None),
        "served_when_saturated": max((_served(step) for step in failed if step.status == "saturated"), default=None),
        "knee": _knee(steps),
        "collapse": _collapse(steps),
        "conclusive": steps[-1].status != "unclear"
        and low is not None
        and (high is not None or low == settings.max_rate),
        "reason": _sentence(steps, low, high, (surely, surely_not)),
        "steps": [step.document() for step in steps],
    }


def _knee(steps: Sequence[Step]) -> float | None:
    """The rate with the most power, throughput over mean latency (Kleinrock, ICC 1979); beyond it one mostly waits."""
    usable = [step for step in steps if step.metrics.get("mean_latency_ms")]
    if len(usable) < 2:
        return None
    return max(usable, key=lambda step: step.metrics["requests_per_second"] / step.metrics["mean_latency_ms"]).rate


def _collapse(steps: Sequence[Step]) -> float | None:
    """The lowest rate beyond the peak at which much less is served than at the peak; None where none was seen."""
    peak = max(steps, key=_served)
    floor = _COLLAPSED * _served(peak)
    return min((step.rate for step in steps if step.rate > peak.rate and _served(step) < floor), default=None)


def _served(step: Step) -> float:
    """Requests a second that a step shows the server to serve: while they arrived, or until the last was answered.

    A server that works on many at once finishes few of them while more arrive; it is not slower for that.
    """
    return max(step.queue.served_per_second, step.metrics["drained_requests_per_second"])


def _sentence(
    steps: Sequence[Step], low: float | None, high: float | None, interval: tuple[float | None, float | None]
) -> str:
    late = steps[-1].status == "unclear"
    if low is None and high is None:
        return f"not found: at {steps[-1].rate:.3g} requests/s {steps[-1].reason}"
    if low is None:
        return f"the service level holds at no rate down to {min(step.rate for step in steps):.3g} requests/s"
    surely, surely_not = (f"{end:.3g}" if end is not None else "unknown" for end in interval)
    if high is None:
        why = "the client can't send more in time" if late else "no higher rate was tried"
        return f"at least {low:.3g} requests/s: {why}"
    unsure = f"; not more closely, for at {steps[-1].rate:.3g}/s {steps[-1].reason}" if late else ""
    return f"{low:.3g} requests/s (surely {surely}, surely not {surely_not}){unsure}"
