"""The search for the capacity, against queues whose capacity is known."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from queues import rows

from evals.load.capacity import Capacity, CapacitySearch, SendTraffic, judge_step, search, step_metrics
from evals.load.requests import RequestRecord
from evals.load.traffic.profile import Arrivals
from evals.load.traffic.schedule import arrivals

WORKERS, SERVICE_MS = 4, 100.0  # 40 a second, and no more
LIMITS = {"p95_latency_ms": 500.0, "error_rate": 0.0}


def fixed(workers: int = WORKERS, service_ms: float = SERVICE_MS, seed: int = 0) -> tuple[SendTraffic, list[float]]:
    """A server of fixed service time, and the rates that it was put under."""
    tried: list[float] = []

    def load(rate: float, seconds: float) -> tuple[list[RequestRecord], float]:
        tried.append(rate)
        count = round(rate * seconds)
        due = arrivals(Arrivals(), count, seconds, random.Random(1000 * seed + len(tried)))
        return rows(due, [service_ms] * count, workers), 0.0

    return load, tried


def find(load: SendTraffic, limits: dict[str, float] = LIMITS, start: float = 4, **settings: float) -> Capacity:
    return search(
        CapacitySearch.model_validate(settings), limits, start, load, max_client_late_ms=100, progress=lambda _: None
    )


def known(value: float | None) -> float:
    """A figure that this search has."""
    assert value is not None
    return value


def optimum(limit_ms: float, workers: int = WORKERS, service_ms: float = SERVICE_MS) -> float:
    """The rate at which the p95 of a long run of Poisson arrivals reaches the limit: bisected."""
    low, high = 0.0, workers * 1000 / service_ms
    for _ in range(12):
        rate = (low + high) / 2
        chance, at, due = random.Random(5), 0.0, []
        for _ in range(15_000):
            at += 1000 * chance.expovariate(rate)
            due.append(at)
        latencies = sorted(known(row.latency_ms) for row in rows(due, [service_ms] * len(due), workers))
        low, high = (rate, high) if latencies[int(0.95 * len(latencies))] <= limit_ms else (low, rate)
    return low


@pytest.mark.parametrize("limit", [200.0, 500.0])
def test_the_capacity_is_that_of_queueing_theory(limit: float) -> None:
    truth = optimum(limit)
    limits = {**LIMITS, "p95_latency_ms": limit}
    found = [known(find(fixed(seed=seed)[0], limits).requests_per_second) for seed in range(5)]
    assert sorted(found)[2] == pytest.approx(truth, rel=0.1)
    assert all(rate == pytest.approx(truth, rel=0.2) for rate in found)


def test_without_a_tight_limit_it_is_what_the_workers_can_do() -> None:
    found = find(fixed()[0], {"p95_latency_ms": 5000.0, "error_rate": 0.0})
    assert found.requests_per_second == pytest.approx(40, rel=0.1)
    assert found.served_when_saturated == pytest.approx(40, rel=0.05)
    assert known(found.interval[0]) <= 40 * 1.05
    assert known(found.interval[1]) >= 40 * 0.95


def test_saturation_is_called_at_the_first_rate_beyond_it() -> None:
    load, tried = fixed()
    found = find(load, {"p95_latency_ms": 5000.0, "error_rate": 0.0})
    status = {step.rate: step.status for step in found.steps}
    assert tried[:5] == [4, 8, 16, 32, 64]
    assert [status[rate] for rate in (4, 8, 16, 32, 64)] == ["holds"] * 4 + ["saturated"]
    assert 40 < known(found.saturated_from) <= 48


def test_what_was_found_held_twice_and_the_ends_are_close() -> None:
    found = find(fixed()[0])
    held = [step for step in found.steps if step.rate == found.requests_per_second]
    assert [step.status for step in held] == ["holds", "holds"]
    assert known(found.first_failing) / known(found.requests_per_second) <= 1.1
    assert found.conclusive


def test_a_start_that_is_too_high_is_come_down_from() -> None:
    found = find(fixed()[0], start=500)
    assert found.requests_per_second == pytest.approx(36, rel=0.15)


def test_a_level_that_holds_nowhere_has_no_capacity() -> None:
    found = find(fixed()[0], {"p95_latency_ms": 50.0}, max_steps=5)
    assert (found.requests_per_second, found.conclusive) == (None, False)
    assert "at no rate" in found.reason


def test_a_client_that_is_late_ends_the_search_and_is_not_the_servers_fault() -> None:
    slow, _ = fixed(workers=10_000, service_ms=100.0)

    def drowned(rate: float, seconds: float) -> tuple[Sequence[RequestRecord], float]:
        made = slow(rate, seconds)[0]
        if rate <= 50:
            return made, 1.0
        return [row.model_copy(update={"latency_ms": (row.latency_ms or 0) + 900}) for row in made], 900.0

    found = find(drowned)
    assert [step.status for step in found.steps[-2:]] == ["unclear", "unclear"]
    assert found.requests_per_second == 32
    assert found.reason.startswith("at least 32 requests/s: the client")


def test_a_rate_that_may_not_be_exceeded_ends_the_search() -> None:
    load, tried = fixed()
    found = find(load, max_rate=20)
    assert max(tried) == 20
    assert found.requests_per_second == 20


def test_a_server_whose_throughput_falls_under_load_is_seen_to_collapse() -> None:
    def thrashing(rate: float, seconds: float) -> tuple[list[RequestRecord], float]:
        count = round(rate * seconds)
        due = arrivals(Arrivals(), count, seconds, random.Random(count))
        return rows(due, [SERVICE_MS * (1 if rate <= 40 else 3)] * count, WORKERS), 0.0

    found = find(thrashing)
    assert found.collapse is not None
    assert found.collapse > 40
    assert find(fixed()[0]).collapse is None


def test_the_knee_is_below_the_capacity_and_above_idleness() -> None:
    found = find(fixed()[0], {"p95_latency_ms": 5000.0})
    assert 16 <= known(found.knee) <= 40


def test_errors_are_counted_and_fail_a_step() -> None:
    made = rows([0.0, 100.0, 200.0, 300.0], [50.0] * 4, 2)
    made[3] = RequestRecord(number=3, due_ms=300, start_ms=300, end_ms=301, error="500")
    assert step_metrics(made, 1.0)["error_rate"] == 0.25
    assert step_metrics(made, 1.0)["requests_per_second"] == 3
    step = judge_step(4, 1.0, made, {"error_rate": 0.0}, 1.0, 100.0)
    assert (step.status, step.clear) == ("misses", True)


def test_a_request_that_the_client_never_sent_is_not_the_servers_fault() -> None:
    made = rows([10.0 * n for n in range(100)], [5.0] * 100, 2)
    made[50:] = [RequestRecord(number=n, due_ms=10 * n, error="no record") for n in range(50, 100)]
    step = judge_step(100, 1.0, made, {"error_rate": 0.0}, 1.0, 100.0)
    assert (step.status, step.queue.growing) == ("unclear", True)
    assert "did not send 50 of 100" in step.reason


def late_client(asked: float, sent: float, seconds: float, workers: int) -> list[RequestRecord]:
    """The rows of a client that sends fewer requests a second than it should, to so many workers of 100 ms."""
    count = round(asked * seconds)
    starts = [1000 * n / min(asked, sent) for n in range(count)]
    return [
        row.model_copy(update={"due_ms": due, "late_ms": start - due, "latency_ms": (row.end_ms or 0) - due})
        for row, start, due in zip(
            rows(starts, [SERVICE_MS] * count, workers), starts, [1000 * n / asked for n in range(count)], strict=True
        )
    ]


@pytest.mark.parametrize("limit_ms", [500.0, 60_000.0])
def test_a_client_that_can_not_send_fast_enough_is_not_a_server_that_is_saturated(limit_ms: float) -> None:
    made = late_client(128, 80, 20, workers=1000)
    step = judge_step(128, 20, made, {"p95_latency_ms": limit_ms}, 7000.0, 100.0)
    assert (step.status, "the client itself" in step.reason) == ("unclear", True)
    # The 80 a second that it does send are too many for four workers.
    made = late_client(128, 80, 20, workers=4)
    assert judge_step(128, 20, made, {"p95_latency_ms": limit_ms}, 7000.0, 100.0).status == "saturated"


def test_a_search_that_the_client_ended_between_two_rates_is_not_conclusive() -> None:
    server, _ = fixed()

    def stumbling(rate: float, seconds: float) -> tuple[Sequence[RequestRecord], float]:
        made, late = server(rate, seconds)
        return made, 900.0 if 32 < rate < 64 else late

    found = find(stumbling)
    assert (found.requests_per_second, found.first_failing, found.conclusive) == (32, 64, False)
    assert "the client itself" in found.reason
    never = find(lambda rate, seconds: (server(rate, seconds)[0], 900.0))
    assert never.requests_per_second is None
    assert never.reason.startswith("not found: at 4 requests/s the client itself")


def test_a_server_that_answers_nothing_does_not_hold_the_search_for_ever() -> None:
    def dead(rate: float, seconds: float) -> tuple[Sequence[RequestRecord], float]:
        made = rows([1000 * n / rate for n in range(round(rate * seconds))], [1.0] * round(rate * seconds), 4)
        return [row.model_copy(update={"error": "500 Internal Server Error"}) for row in made], 0.0

    found = find(dead, max_steps=40)
    assert min(step.rate for step in found.steps) == 4 / 32
    assert max(step.seconds for step in found.steps) <= CapacitySearch().longest_step_s(4, 1.0)
    assert all(step.queue.served_per_second == 0 for step in found.steps)


def chosen(values: Callable[[int], float]) -> bool:
    made = [
        row.model_copy(update={"latency_ms": values(row.number)})
        for row in rows([100.0 * n for n in range(200)], [1.0] * 200, 1)
    ]
    return judge_step(10, 20.0, made, {"p95_latency_ms": 100.0}, 1.0, 100.0).clear


def test_a_step_whose_limit_is_within_chance_is_not_clear() -> None:
    chance = random.Random(3)
    assert chosen(lambda _: chance.uniform(0, 50))
    assert chosen(lambda _: chance.uniform(150, 200))
    # One in twenty is slow, and they come in clusters: with other clusters the p95 would be another.
    assert not chosen(lambda number: 150.0 if number // 20 % 2 and number % 20 < 2 else 50.0)
