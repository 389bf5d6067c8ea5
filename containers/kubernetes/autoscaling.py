"""Simulates the autoscaler over a day, to compare its targets with scaling on the number of requests.

Kubernetes' rule (autoscaling/v2): every 15 s, desired replicas = ceil(sum of a metric over the pods / its target),
unchanged within a tolerance of 10%; the metric with the most desired replicas counts. Replicas at most double within
the time of a start, and decrease by one per minute, never below the most desired in the window before. A starting
replica counts but does not serve.

Servers are a fluid model: a replica processes ``capacity`` mean requests per second. At a load of ``u`` times that,
``u * in_flight`` requests are in flight, and the excess waits. A request's weight is its work relative to the tested
mean: long documents weigh more than questions, which a count of requests does not show.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TICK_S = 15
_TOLERANCE = 0.1
_DOWN_EVERY_S = 60
HOURS = 24


@dataclass(frozen=True)
class SimulatedReplica:
    """One replica as measured in the load test; ``slack_seconds`` is how long a request may wait within its limit."""

    capacity: float
    in_flight: float
    start_seconds: float
    slack_seconds: float


@dataclass(frozen=True)
class Behaviour:
    """The autoscaler's settings, as in ``hpa.yaml``."""

    least: int
    most: int
    up_seconds: float
    down_window_seconds: float


@dataclass(frozen=True)
class Day:
    """A day in ticks of 15 s: the requests per second, and the weight of a request, at each."""

    rates: Sequence[float]
    weights: Sequence[float]


@dataclass(frozen=True)
class Sight:
    """The inputs of a metric: requests per second, and running and waiting requests of all replicas together."""

    rate: float
    running: float
    waiting: float


# A metric's sum over all pods divided by its target per pod: the desired replicas, before rounding.
Signal = Callable[[Sight], float]


@dataclass(frozen=True)
class SimulationResult:
    """The result of a day: replicas at each tick, all and late requests, and replica hours."""

    replicas: Sequence[int]
    requests: float
    late: float
    replica_hours: float

    @property
    def late_share(self) -> float:
        """The share of requests that exceeded their limit."""
        return self.late / self.requests if self.requests else 0.0


def make_day(hourly: Sequence[float], weights: Sequence[float], *, bursts: Sequence[int] = (), seed: int = 0) -> Day:
    """Draw a day between hourly rates and weights, with Poisson noise and ten minutes of twice the rate at ``bursts``.

    Args:
        hourly: 24 rates in requests a second.
        weights: 24 weights of a mean request.
        bursts: the hours in which a burst begins, at half past.
        seed: of the noise.
    """
    chance = random.Random(seed)  # noqa: S311 - a simulation's noise
    rates, heavy = [], []
    for tick in range(HOURS * 3600 // TICK_S):
        second = tick * TICK_S
        expected = TICK_S * _between(hourly, second)
        if any(1800 <= second - 3600 * hour < 2400 for hour in bursts):
            expected *= 2
        # A normal law stands in for Poisson's where a tick has many requests.
        rates.append(max(0.0, chance.gauss(expected, math.sqrt(expected))) / TICK_S)
        heavy.append(_between(weights, second))
    return Day(rates, heavy)


def simulate(day: Day, replica: SimulatedReplica, behaviour: Behaviour, signals: Sequence[Signal]) -> SimulationResult:
    """Simulate a day under an autoscaler that uses ``signals``."""
    running = behaviour.least
    starting: deque[float] = deque()
    wanted_before: deque[int] = deque(maxlen=max(1, round(behaviour.down_window_seconds / TICK_S)))
    grown: deque[tuple[float, int]] = deque()
    backlog = total = late = hours = 0.0
    shrunk = -math.inf
    history = []
    for tick, (rate, weight) in enumerate(zip(day.rates, day.weights, strict=True)):
        now = tick * TICK_S
        while starting and starting[0] <= now:
            starting.popleft()
            running += 1
        work, room = rate * weight, running * replica.capacity
        wait = backlog / room
        backlog = max(0.0, backlog + (work - room) * TICK_S)
        total += rate * TICK_S
        late += rate * TICK_S if max(wait, backlog / room) > replica.slack_seconds else 0.0
        there = running + len(starting)
        hours += there * TICK_S / 3600
        history.append(there)
        busy = min(1.0, work / room) * running
        sight = Sight(rate, busy * replica.in_flight, backlog / weight if weight else 0.0)
        wanted = _wanted([signal(sight) for signal in signals], there, behaviour)
        wanted_before.append(wanted)
        while grown and grown[0][0] <= now - behaviour.up_seconds:
            grown.popleft()
        if wanted > there:
            allowed = 2 * (grown[0][1] if grown else there)
            count = min(wanted, allowed) - there
            if count > 0:
                grown.append((now, there))
                starting.extend([now + replica.start_seconds] * count)
        elif max(wanted_before) < there and now - shrunk >= _DOWN_EVERY_S and running > behaviour.least:
            running, shrunk = running - 1, now
    return SimulationResult(history, total, late, hours)


def outstanding(target: float) -> Signal:
    """Scale on running and waiting requests, at most ``target`` per replica."""
    return lambda sight: (sight.running + sight.waiting) / target


def waiting(target: float) -> Signal:
    """Scale on waiting requests, at most ``target`` per replica."""
    return lambda sight: sight.waiting / target


def request_count(target: float) -> Signal:
    """Scale on requests per second, at most ``target`` per replica."""
    return lambda sight: sight.rate / target


def memory_gauge() -> Signal:
    """Scale on the GPU's memory, which vLLM reserves at its start: it never asks for more replicas."""
    return lambda _: 0.0


def _wanted(asked: Sequence[float], there: int, behaviour: Behaviour) -> int:
    most = max(asked)
    wanted = there if abs(most / there - 1) <= _TOLERANCE else math.ceil(most)
    return min(behaviour.most, max(behaviour.least, wanted))


def _between(hourly: Sequence[float], second: int) -> float:
    """Interpolate linearly between the middles of the hours, also across midnight."""
    place = (second / 3600 - 0.5) % HOURS
    first = int(place)
    share = place - first
    return (1 - share) * hourly[first % HOURS] + share * hourly[(first + 1) % HOURS]
