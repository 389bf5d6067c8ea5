"""The autoscaler's arithmetic over a day: what its targets lead to, beside scaling on the number of requests.

Kubernetes' rule (autoscaling/v2): every 15 s, replicas wanted = ceil(sum of a metric over the pods / its target),
nothing within a tenth of what there is; the most wanted by any metric wins; up at most to twice as many in a start's
time, down by one a minute and never below what was wanted in the window before. A replica that starts counts and does
not serve.

The server is a fluid: a replica works off ``capacity`` mean requests a second. At a share ``u`` of it ``u * in_flight``
requests are under way, and what is beyond it waits. A request's weight is its work beside the tested mean: long
documents weigh more than questions, which is what a count of requests can't see.
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
class Replica:
    """One replica as the load test measured it, and the seconds that an answer may wait before it misses its limit."""

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
    """A day in ticks of 15 s: requests a second, and the weight of a request, at each."""

    rates: Sequence[float]
    weights: Sequence[float]


@dataclass(frozen=True)
class Sight:
    """What a metric may look at: requests a second, and the requests under way and waiting, all replicas together."""

    rate: float
    running: float
    waiting: float


# A metric's sum over all pods, over its target a pod: replicas wanted, before rounding.
Signal = Callable[[Sight], float]


@dataclass(frozen=True)
class Outcome:
    """What a day came to: replicas at each tick, requests in all and late ones, and the hours that replicas ran."""

    replicas: Sequence[int]
    requests: float
    late: float
    replica_hours: float

    @property
    def late_share(self) -> float:
        """The share of requests that missed their limit."""
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


def simulate(day: Day, replica: Replica, behaviour: Behaviour, signals: Sequence[Signal]) -> Outcome:
    """Run a day under an autoscaler that looks at ``signals``."""
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
    return Outcome(history, total, late, hours)


def outstanding(target: float) -> Signal:
    """Scale on the requests under way and waiting, at most ``target`` a replica."""
    return lambda sight: (sight.running + sight.waiting) / target


def waiting(target: float) -> Signal:
    """Scale on the requests that wait, at most ``target`` a replica."""
    return lambda sight: sight.waiting / target


def request_count(target: float) -> Signal:
    """Scale on requests a second, at most ``target`` a replica: what a count of requests can see."""
    return lambda sight: sight.rate / target


def memory_gauge() -> Signal:
    """Scale on the GPU's memory, which vLLM takes when it starts: it never asks for anything."""
    return lambda _: 0.0


def _wanted(asked: Sequence[float], there: int, behaviour: Behaviour) -> int:
    most = max(asked)
    wanted = there if abs(most / there - 1) <= _TOLERANCE else math.ceil(most)
    return min(behaviour.most, max(behaviour.least, wanted))


def _between(hourly: Sequence[float], second: int) -> float:
    """Between the middles of the hours, in a straight line; midnight meets itself."""
    place = (second / 3600 - 0.5) % HOURS
    first = int(place)
    share = place - first
    return (1 - share) * hourly[first % HOURS] + share * hourly[(first + 1) % HOURS]
