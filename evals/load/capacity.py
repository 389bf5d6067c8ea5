"""Search for the capacity: the highest rate at which the service level still holds, with its uncertainty.

The search brackets the capacity, then bisects. It sends no request itself: `search` gets a callable that sends traffic
at one rate and returns the requests' records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from evals.load.queueing import Queue, queue
from evals.load.requests import RequestRecord
from evals.load.slo import DISTRIBUTIONS, PERCENTILES, Positive, met, percentile
from registry.progress import Progress

# Sends traffic at a rate (requests a second) for so many seconds; returns the requests' records, and by how many
# milliseconds the client itself was late at p95.
SendTraffic = Callable[[float, float], tuple[Sequence[RequestRecord], float]]
Status = Literal["holds", "misses", "saturated", "unclear"]

_RESAMPLES = 200
_BLOCKS = 10
# A step lasts at least this many times as long as an answer: in a shorter one an empty server only fills.
_ANSWERS_A_STEP = 8.0
# The rate is not halved below this share of the first one: with a server that holds the level at no rate, the search
# would take days.
_LOWEST_SHARE = 1 / 32
# Throughput that falls to this share of its peak while the rate rises is a collapse.
_COLLAPSED = 0.85


class CapacitySearch(BaseModel):
    """How the capacity is searched for.

    The search ends when the highest rate that holds and the lowest that fails are close, and the former held twice.
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


class CapacityStep(BaseModel):
    """What the traffic at one rate showed. ``clear``: chance alone is unlikely to have decided the status."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    rate: float
    """Requests per second."""
    seconds: float
    """How long requests arrived."""
    requests: int
    """Number of requests."""
    status: Status
    """Whether the server held the limits."""
    clear: bool
    """Whether chance is unlikely to have decided the status."""
    reason: str
    """Why, with the values."""
    metrics: Mapping[str, float]
    """The measured values, by name."""
    queue: Queue
    """The requests in the server over time."""
    client_late_ms: float
    """How late the load generator sent requests, in milliseconds."""

    @property
    def failed(self) -> bool:
        """Whether the service level did not hold at this rate."""
        return self.status in {"misses", "saturated"}

    @property
    def served_per_second(self) -> float:
        """Requests a second that the server answers: while they arrived, or until the last was answered.

        A server that works on many at once finishes few of them while more arrive; it is not slower for that.
        """
        return max(self.queue.served_per_second, self.metrics["drained_requests_per_second"])


class Capacity(BaseModel):
    """What the search found: rates in requests a second, None where none was found, and every step.

    ``interval`` is the highest rate that clearly held and the lowest that clearly failed; ``first_failing`` the lowest
    that failed; ``knee`` the rate beyond which requests mostly wait; ``collapse`` the lowest rate at which much less is
    served than at the peak. ``conclusive``: the server's own limit was found, or the highest rate allowed held.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    settings: CapacitySearch
    """How the capacity was searched for."""
    limits: Mapping[str, float]
    """The limits to hold."""
    requests_per_second: float | None
    """The capacity in requests per second."""
    output_tokens_per_second: float | None
    """The capacity in output tokens per second."""
    interval: tuple[float | None, float | None]
    """The highest rate that clearly held and the lowest that clearly failed."""
    first_failing: float | None
    """The lowest rate that failed."""
    saturated_from: float | None
    """The lowest rate at which the server was saturated."""
    served_when_saturated: float | None
    """Requests per second that it answered when saturated."""
    knee: float | None
    """The rate above which requests mostly wait."""
    collapse: float | None
    """The lowest rate at which much less is answered than at the peak."""
    conclusive: bool
    """Whether the search found the server's limit, or the highest allowed rate held."""
    reason: str
    """Why the search ended."""
    steps: tuple[CapacityStep, ...]
    """The result at each rate."""


def search(
    settings: CapacitySearch,
    limits: Mapping[str, float],
    start: float,
    send: SendTraffic,
    *,
    max_client_late_ms: float,
    progress: Progress,
) -> Capacity:
    """Find the capacity.

    Args:
        settings: how long steps are and when to end.
        limits: the service level: percentiles and error rate are held to; other limits do not depend on the rate.
        start: the first rate, in requests a second.
        send: sends traffic at a rate for so many seconds.
        max_client_late_ms: a client that is later than this at p95 makes a step unclear.
        progress: called with the result of each step.
    """
    judged = {name: value for name, value in limits.items() if name.endswith("_ms") or name == "error_rate"}
    steps: list[CapacityStep] = []
    rate: float | None = start if settings.max_rate is None else min(start, settings.max_rate)
    longest = 0.0
    while rate is not None and len(steps) < settings.max_steps:
        seconds = max(settings.step_seconds, settings.min_requests / rate, longest)
        requests, late = send(rate, seconds)
        step = judge_step(rate, seconds, requests, judged, late, max_client_late_ms)
        if step.status == "holds" and "p50_latency_ms" in step.metrics:
            longest = max(longest, _ANSWERS_A_STEP * step.metrics["p50_latency_ms"] / 1000)
        steps.append(step)
        progress(f"{rate:.3g} requests/s: {step.reason}")
        rate = _next(steps, settings)
    return _conclude(steps, settings, limits)


def judge_step(
    rate: float,
    seconds: float,
    requests: Sequence[RequestRecord],
    limits: Mapping[str, float],
    client_late_ms: float,
    max_client_late_ms: float,
) -> CapacityStep:
    """Judge a rate: it holds, misses a limit, saturates the server, or is unclear because the client was late.

    A late client sends at a lower rate than asked. A server that this saturates is saturated at the full rate too;
    nothing else follows from it, except errors.
    """
    waiting = queue(requests, seconds)
    metrics = step_metrics(requests, seconds)
    missed = [name for name in limits if not met(name, metrics, limits)]

    def made(status: Status, reason: str, *, clear: bool) -> CapacityStep:
        return CapacityStep(
            rate=rate,
            seconds=seconds,
            requests=len(requests),
            status=status,
            clear=clear,
            reason=reason,
            metrics=metrics,
            queue=waiting,
            client_late_ms=client_late_ms,
        )

    lost = sum(request.start_ms is None for request in requests)
    if lost:
        return made("unclear", f"the client did not send {lost} of {len(requests)} requests", clear=False)
    if waiting.growing:
        grown = f"the queue grew from {waiting.in_server_first:.1f} to {waiting.in_server_last:.1f} requests"
        return made("saturated", f"{grown}; the server answers {waiting.served_per_second:.3g}/s", clear=True)
    if client_late_ms > max_client_late_ms and missed != ["error_rate"]:
        return made("unclear", f"the client itself was {client_late_ms:.0f} ms late at p95", clear=False)
    straddling = [name for name in limits if _straddles(name, requests, limits[name])]
    measured = ", ".join(f"{name} {metrics[name]:,.4g}" for name in (missed or limits) if name in metrics)
    if missed:
        return made("misses", f"misses {measured or ', '.join(missed)}", clear=bool(set(missed) - set(straddling)))
    return made("holds", f"holds, {measured}", clear=not straddling)


def step_metrics(requests: Sequence[RequestRecord], seconds: float) -> dict[str, float]:
    """Percentiles, error rate and throughput of a step; throughput counts what was answered while requests arrived."""
    good = [request for request in requests if request.answered]
    metrics = {"error_rate": (len(requests) - len(good)) / len(requests) if requests else 1.0}
    for column in DISTRIBUTIONS:
        values = [value for request in good if (value := request.column(column)) is not None]
        if values:
            metrics |= {f"p{share}_{column}": percentile(values, share) for share in PERCENTILES}
    latencies = [request.latency_ms for request in good if request.latency_ms is not None]
    if latencies:
        metrics["mean_latency_ms"] = sum(latencies) / len(latencies)
    ends = [request.end_ms or 0.0 for request in good]
    in_time = [request for request, end in zip(good, ends, strict=True) if end <= seconds * 1000]
    metrics["requests_per_second"] = len(in_time) / seconds
    metrics["drained_requests_per_second"] = len(good) / max(seconds, max(ends, default=0.0) / 1000)
    metrics["output_tokens_per_second"] = sum(request.output_tokens or 0 for request in in_time) / seconds
    return metrics


def _straddles(name: str, requests: Sequence[RequestRecord], limit: float) -> bool:
    """Whether the 90% interval of a percentile contains its limit, by a bootstrap over blocks of time.

    Requests in one queue wait for similar times: resampling them one by one would make the interval too narrow, so
    whole tenths of the step are drawn (the block bootstrap, Künsch, Annals of Statistics 17:1217-1241, 1989).
    """
    share, _, column = name.removeprefix("p").partition("_")
    if column not in DISTRIBUTIONS or not share.isdecimal():
        return False
    values = np.array([value for each in requests if each.answered and (value := each.column(column)) is not None])
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


def _next(steps: Sequence[CapacityStep], settings: CapacitySearch) -> float | None:
    """The rate to try next; None at the end of the search: at the tolerance, the maximum, or the client's own limit."""
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


def _within(steps: Sequence[CapacityStep], low: float | None, high: float, settings: CapacitySearch) -> float | None:
    """Halve until a rate holds; then try what the saturated server answered, once; then the geometric mean of the ends.

    Capacity can't be far below what a saturated server answers, so that saves steps. The rate that is found is tried a
    second time: near capacity queues are long by chance, and the highest of several rates that held once may have held
    by chance.
    """
    served = max((step.served_per_second for step in steps if step.status == "saturated"), default=0.0)
    if low is None:
        return max(_LOWEST_SHARE * steps[0].rate, min(high / 2, 0.9 * served) if served else high / 2)
    if high / low <= 1 + settings.tolerance:
        return low if sum(step.rate == low for step in steps) == 1 else None
    guess = 0.95 * served
    tried = any(abs(step.rate / guess - 1) < settings.tolerance / 4 for step in steps) if guess else True
    return guess if not tried and 1.02 * low < guess < 0.98 * high else math.sqrt(low * high)


def _bracket(steps: Sequence[CapacityStep]) -> tuple[float | None, float | None]:
    """The highest rate that held below every failure, and the lowest that failed."""
    high = min((step.rate for step in steps if step.failed), default=None)
    low = max(
        (step.rate for step in steps if step.status == "holds" and (high is None or step.rate < high)), default=None
    )
    return low, high


def _conclude(steps: Sequence[CapacityStep], settings: CapacitySearch, limits: Mapping[str, float]) -> Capacity:
    low, high = _bracket(steps)
    holding = next((step for step in steps if step.status == "holds" and step.rate == low), None)
    saturated = [step for step in steps if step.status == "saturated"]
    clearly_held = [step.rate for step in steps if step.status == "holds" and step.clear and step.rate <= (low or 0)]
    clearly_failed = [step.rate for step in steps if step.failed and step.clear]
    interval = (max(clearly_held, default=None), min(clearly_failed, default=None))
    return Capacity(
        settings=settings,
        limits=dict(limits),
        requests_per_second=low,
        output_tokens_per_second=holding.metrics["output_tokens_per_second"] if holding else None,
        interval=interval,
        first_failing=high,
        saturated_from=min((step.rate for step in saturated), default=None),
        served_when_saturated=max((step.served_per_second for step in saturated), default=None),
        knee=_knee(steps),
        collapse=_collapse(steps),
        conclusive=steps[-1].status != "unclear" and low is not None and (high is not None or low == settings.max_rate),
        reason=_sentence(steps, low, high, interval),
        steps=tuple(steps),
    )


def _knee(steps: Sequence[CapacityStep]) -> float | None:
    """The rate with the most power, throughput over mean latency (Kleinrock, ICC 1979); beyond it requests wait."""
    usable = [step for step in steps if step.metrics.get("mean_latency_ms")]
    if len(usable) < 2:
        return None
    return max(usable, key=lambda step: step.metrics["requests_per_second"] / step.metrics["mean_latency_ms"]).rate


def _collapse(steps: Sequence[CapacityStep]) -> float | None:
    """The lowest rate beyond the peak at which much less is served than at the peak; None where there is none."""
    peak = max(steps, key=lambda step: step.served_per_second)
    floor = _COLLAPSED * peak.served_per_second
    return min((step.rate for step in steps if step.rate > peak.rate and step.served_per_second < floor), default=None)


def _sentence(
    steps: Sequence[CapacityStep], low: float | None, high: float | None, interval: tuple[float | None, float | None]
) -> str:
    last = steps[-1]
    if low is None and high is None:
        return f"not found: at {last.rate:.3g} requests/s {last.reason}"
    if low is None:
        return f"the service level holds at no rate down to {min(step.rate for step in steps):.3g} requests/s"
    if high is None:
        why = "the client can't send more in time" if last.status == "unclear" else "no higher rate was tried"
        return f"at least {low:.3g} requests/s: {why}"
    lower, upper = (f"{end:.3g}" if end is not None else "unknown" for end in interval)
    ended = f"; the search ended because at {last.rate:.3g}/s {last.reason}" if last.status == "unclear" else ""
    return f"{low:.3g} requests/s (lower bound {lower}, upper bound {upper}){ended}"
