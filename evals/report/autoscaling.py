"""A simulated day under a bundle's autoscaler and under other ways to scale: the comparison and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from containers.kubernetes.autoscaling import (
    Behaviour,
    SimulatedReplica,
    SimulationResult,
    make_day,
    outstanding,
    request_count,
    simulate,
    waiting,
)
from containers.kubernetes.numbers import HEADROOM_TARGET, Number
from evals.load.cost import USUAL_DAY
from evals.report.svg import WIDTH, Axis, Canvas

# The weight of a request by hour, an assumption: questions by day, long documents in the evening, little at night.
WEIGHTS = tuple(0.6 if hour < 7 else 1.0 if hour < 17 else 1.8 if hour < 22 else 1.0 for hour in range(24))
# Replicas that the busiest hour needs, if the model's file plans for no day.
_PEAK_REPLICAS = 6
_BURSTS = (11,)
OURS, COUNT = "measured load", "number of requests"
SAFE_COUNT, FIXED = "number of requests, all taken as the heaviest", "always as many as the peak needs"


class _SimulationDocument(BaseModel):
    model_config = ConfigDict(frozen=True, populate_by_name=True)


class SimulatedDay(_SimulationDocument):
    """The day under one way to scale: replicas every five minutes, requests, late requests, and replica-hours."""

    replicas: tuple[int, ...]
    requests: float
    late: float
    late_share: float
    replica_hours: float


class Assumptions(_SimulationDocument):
    """The day that is simulated: weights and requests a second by hour, and the hours of bursts."""

    weights: tuple[float, ...]
    rates: tuple[float, ...]
    bursts: tuple[int, ...]


class AutoscalingComparison(_SimulationDocument):
    """What ``simulation.json`` holds: each way to scale by its name; ``load`` is in replicas, every five minutes."""

    schema_: Annotated[Literal["slipway/autoscaling/1"], Field(alias="schema")] = "slipway/autoscaling/1"
    assumed: Assumptions
    runs: Mapping[str, SimulatedDay]
    load: tuple[float, ...]

    def format(self) -> str:
        """The text of ``simulation.json``."""
        return self.model_dump_json(by_alias=True, indent=1)


def compare(
    numbers: Mapping[str, Number], p95_ms: float | None, hourly: Sequence[float] | None = None
) -> AutoscalingComparison:
    """Simulate a day under the bundle's targets, under a count of requests, and with a fixed number of replicas.

    Args:
        numbers: the bundle's numbers.
        p95_ms: the measured p95 latency; the slack is the rest of the service level.
        hourly: requests a second in each hour; by default a working day whose busiest hour needs six replicas.
    """
    replica = SimulatedReplica(
        capacity=float(numbers["capacity"].value),
        in_flight=float(numbers["in_flight"].value),
        start_seconds=float(numbers["start_seconds"].value),
        slack_seconds=max(0.0, float(numbers["p95_seconds"].value) - (p95_ms or 0.0) / 1000),
    )
    rates = list(hourly) if hourly else _working_day(replica.capacity)
    day = make_day(rates, WEIGHTS, bursts=_BURSTS)
    most = max(2 * _PEAK_REPLICAS, int(numbers["most_replicas"].value))
    behaviour = Behaviour(
        least=int(numbers["replicas"].value),
        most=most,
        up_seconds=float(numbers["scale_up_seconds"].value),
        down_window_seconds=float(numbers["scale_down_seconds"].value),
    )
    by_load = [outstanding(_quantity(numbers["outstanding_target"])), waiting(_quantity(numbers["waiting_target"]))]
    runs = {
        OURS: simulate(day, replica, behaviour, by_load),
        COUNT: simulate(day, replica, behaviour, [request_count(HEADROOM_TARGET * replica.capacity)]),
    }
    heaviest = HEADROOM_TARGET * replica.capacity / max(WEIGHTS)
    runs[SAFE_COUNT] = simulate(day, replica, behaviour, [request_count(heaviest)])
    fixed = max(runs[OURS].replicas)
    still = Behaviour(least=fixed, most=fixed, up_seconds=1, down_window_seconds=1)
    runs[FIXED] = simulate(day, replica, still, by_load)
    load = [rate * weight / replica.capacity for rate, weight in zip(day.rates, day.weights, strict=True)]
    return AutoscalingComparison(
        assumed=Assumptions(weights=WEIGHTS, rates=tuple(rates), bursts=_BURSTS),
        runs={name: _simulated(run) for name, run in runs.items()},
        load=tuple(_thinned(load)),
    )


def picture(found: AutoscalingComparison) -> str:
    """Draw the replicas through the day under two autoscalers over the load, with the outcome of each way to scale."""
    runs, load = found.runs, found.load
    canvas = Canvas("Replicas through a day", 310)
    canvas.key(44, 14, [("b", OURS), ("warn", COUNT), ("grid", "load, in replicas")])
    most = max(*load, *(max(run.replicas) for run in runs.values()))
    across, up = Axis(0, 24, 44, WIDTH - 22), Axis(0, most * 1.05, 216, 30)
    for value, y in up.ticks(4):
        canvas.line([(44, y), (WIDTH - 22, y)], "grid", width=0.6)
        canvas.text(38, y + 4, f"{value:g}", anchor="end", size=11)
    hours = [24 * place / len(load) for place in range(len(load))]
    canvas.area([(across(0), up(0)), *((across(x), up(y)) for x, y in zip(hours, load, strict=True)),
                 (across(24), up(0))], "ink", opacity=0.12)  # fmt: skip
    for name, colour in ((COUNT, "warn"), (OURS, "b")):
        canvas.line(list(_steps(runs[name].replicas, across, up)), colour, width=2)
    for hour in range(0, 25, 6):
        canvas.text(across(hour), 232, f"{hour}:00", anchor="middle", size=11)
    for row, (name, run) in enumerate(runs.items()):
        words = f"{name}: {run.late_share:.2%} of requests late, {run.replica_hours:,.0f} replica-hours"
        canvas.text(44, 252 + 17 * row, words, size=11)
    return canvas.svg()


def _working_day(capacity: float) -> list[float]:
    heaviest = max(rate * weight for rate, weight in zip(USUAL_DAY, WEIGHTS, strict=True))
    return [_PEAK_REPLICAS * HEADROOM_TARGET * capacity * rate / heaviest for rate in USUAL_DAY]


def _simulated(run: SimulationResult) -> SimulatedDay:
    return SimulatedDay(
        replicas=tuple(round(each) for each in _thinned(run.replicas)),
        requests=run.requests,
        late=run.late,
        late_share=run.late_share,
        replica_hours=run.replica_hours,
    )


def _steps(values: Sequence[float], across: Axis, up: Axis) -> list[tuple[float, float]]:
    points = []
    for place, value in enumerate(values):
        points += [(across(24 * (place + side) / len(values)), up(value)) for side in (0, 1)]
    return points


def _thinned(values: Sequence[float], count: int = 288) -> list[float]:
    """The highest of every five minutes."""
    size = len(values) // count
    return [round(max(values[place * size : (place + 1) * size]), 3) for place in range(count)]


def _quantity(number: Number) -> float:
    """Read a Kubernetes quantity in thousandths."""
    return float(str(number.value).removesuffix("m")) / 1000
