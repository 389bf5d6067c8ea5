"""The requests that follow from a profile and its seed: when each is due, how long it is, which text it shares."""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from evals.load.traffic.profile import Arrivals, Lengths, Segment, TrafficProfile


@dataclass(frozen=True)
class Planned:
    """One request: due ``due_ms`` after the start; ``prefix`` is the number of the text that it shares, or None."""

    due_ms: int
    input_tokens: int
    output_tokens: int
    prefix: int | None = None


@dataclass(frozen=True)
class Schedule:
    """All requests in the order in which they are due, those that warm up, and the lengths of the texts they share."""

    requests: tuple[Planned, ...]
    warmup: tuple[Planned, ...]
    prefix_tokens: tuple[int, ...]


def plan(profile: TrafficProfile) -> Schedule:
    """Draw a profile's requests from its seed."""
    chance = random.Random(profile.seed)  # noqa: S311 - arrival times are no secret
    due = arrivals(profile.arrivals, profile.requests, profile.seconds, chance)
    shared = profile.prefix
    prefixes = _draw(shared.tokens, shared.count, chance) if shared else []

    def drawn(times: Sequence[int]) -> tuple[Planned, ...]:
        inputs, outputs = (_draw(each, len(times), chance) for each in (profile.input_tokens, profile.output_tokens))
        which = [chance.randrange(len(prefixes)) if prefixes else None for _ in times]
        return tuple(itertools.starmap(Planned, zip(times, inputs, outputs, which, strict=True)))

    return Schedule(drawn(due), drawn([0] * profile.warmup_requests), tuple(prefixes))


def arrivals(process: Arrivals, count: int, seconds: float, chance: random.Random) -> list[int]:
    """Return when each of ``count`` requests is due, in whole milliseconds from the start, ascending.

    Given their number, Poisson arrivals are as many uniform times in order: ``count + 1`` exponential gaps over their
    sum. So a profile's rate is met exactly, a missing request can't hide in the chance of it, and a queue that grows is
    told from a number of requests that was high by chance. Gamma's gaps are treated alike.
    """
    if process.process == "even":
        shares = [(number + 0.5) / count for number in range(count)]
    else:
        shape = 1 / process.burstiness**2
        gaps = [chance.gammavariate(shape, 1.0) for _ in range(count + 1)]
        total = sum(gaps)
        shares = [part / total for part in itertools.accumulate(gaps[:-1])]
    return [int(1000 * seconds * at) for at in _warped(shares, process.shape)]


def _warped(shares: Sequence[float], shape: Sequence[Segment]) -> list[float]:
    """Move shares of the requests to shares of the time, by the inverse of the cumulative rate."""
    times = [0.0, *itertools.accumulate(part.share for part in shape)]
    mass = [0.0, *itertools.accumulate(part.share * part.times for part in shape)]
    moved = []
    for share in shares:
        at = share * mass[-1]
        number = min(bisect.bisect_right(mass, at) - 1, len(shape) - 1)
        part = shape[number]
        moved.append(times[number] + (at - mass[number]) / part.times)
    return moved


def _draw(lengths: Lengths, count: int, chance: random.Random) -> list[int]:
    """Lognormal lengths, each between the two ends."""
    return [
        min(lengths.highest, max(lengths.lowest, round(lengths.median * chance.lognormvariate(0.0, lengths.sigma))))
        for _ in range(count)
    ]
