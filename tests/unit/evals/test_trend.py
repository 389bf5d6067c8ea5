"""Slopes with their intervals, and a queue that grows told from one that is long: against queues whose law is known."""

from __future__ import annotations

import random

import numpy as np
import pytest
from queues import rows, served

from evals.load.queueing import queue
from evals.load.requests import RequestRecord
from evals.load.traffic.profile import Arrivals
from evals.load.traffic.schedule import arrivals
from evals.statistics.trend import slope


def grew(load: float, seed: int, *, workers: int = 4, service_ms: float = 100.0, seconds: float = 20.0) -> bool:
    count = round(load * workers * 1000 / service_ms * seconds)
    due = arrivals(Arrivals(), count, seconds, random.Random(seed))
    return queue(rows(due, [service_ms] * count, workers), seconds).growing


def test_the_known_queue_is_the_one_of_the_textbook() -> None:
    assert served([0, 0, 0, 300], [100, 100, 100, 100], 2) == [100, 100, 200, 400]


@pytest.mark.parametrize(("load", "expected"), [(0.5, 0), (0.8, 0), (0.9, 0), (1.2, 10), (1.5, 10), (3.0, 10)])
def test_saturation_is_called_where_more_comes_than_can_be_served_and_nowhere_else(load: float, expected: int) -> None:
    assert sum(grew(load, seed) for seed in range(10)) == expected


@pytest.mark.parametrize(("load", "least", "most"), [(0.95, 0, 1), (1.1, 18, 20)])
def test_near_capacity_it_is_called_late_rather_than_early(load: float, least: int, most: int) -> None:
    assert least <= sum(grew(load, seed) for seed in range(20)) <= most


def test_an_empty_server_that_fills_is_not_saturated() -> None:
    # Sixty requests are always in it, once it is full: that is its work, not its queue.
    assert not any(grew(0.5, seed, workers=120, service_ms=3000) for seed in range(20))


def test_a_burst_that_drains_is_no_saturation() -> None:
    due = [*range(0, 5000, 500), *range(5000, 6000, 10), *range(6000, 20000, 500)]
    assert not queue(rows(due, [100.0] * len(due), 4), 20).growing


def test_lost_requests_stay_in_the_queue() -> None:
    lost = [RequestRecord(number=n, due_ms=n * 100, error="lost") for n in range(200)]
    found = queue(lost, 20)
    assert found.growing
    assert found.served_per_second == 0


def test_a_slope_is_found_in_noise_and_none_where_there_is_none() -> None:
    chance = np.random.default_rng(1)
    at = np.arange(0, 600, 0.1)
    flat = 2e9 + chance.normal(0, 5e6, len(at))
    assert slope(at.tolist(), (flat + 1e6 * at).tolist()).lower > 0.9e6
    steady = slope(at.tolist(), flat.tolist())
    assert steady.lower <= 0 <= steady.upper


def test_a_single_jump_is_no_slope() -> None:
    at = list(range(120))
    jumped = slope(at, [0.0] * 60 + [1e9] * 60)
    assert jumped.lower <= 0
    assert slope(at, [float(each) for each in at]).estimate == pytest.approx(1)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    chance = np.random.default_rng(2)
    at = np.arange(240.0)
    hits = 0
    for _ in range(300):
        found = slope(at.tolist(), (3 * at + chance.normal(0, 50, 240)).tolist())
        hits += found.lower <= 3 <= found.upper
    assert 0.93 <= hits / 300 <= 1


def test_too_few_values_give_no_slope() -> None:
    with pytest.raises(ValueError, match="too few"):
        slope([1.0, 2.0], [1.0, 2.0])
