from __future__ import annotations

import json

import load_evidence
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from evals.load.cost import (
    USUAL_DAY,
    Api,
    Cloud,
    CostPlan,
    Own,
    Throughput,
    api_per_million,
    break_even,
    cost_evidence,
    hybrids,
    parse_cost,
    per_million,
    replicas_by_hour,
    sentences,
    throughput,
)
from evals.load.requests import RequestRecord
from evals.report import cost_pictures, report

CARRIED = Throughput(
    requests_per_second=10, output_tokens_per_second=1000, prompt_tokens=300, answer_tokens=100, at_slo=True
)
PLAN = CostPlan(
    cloud=Cloud(dollars_per_hour=3.6), own=Own(dollars=30000), api=Api(input=0.1, output=0.4), requests_per_day=2e6
)


def test_a_rented_replica_that_is_always_busy() -> None:
    # 3.6 million tokens an hour for 3.60 dollars.
    assert per_million(3.6, CARRIED) == pytest.approx(1.0)
    assert per_million(3.6, CARRIED, 0.5) == pytest.approx(2.0)


def test_an_owned_replica_costs_its_price_power_and_upkeep() -> None:
    own = Own(dollars=26298, years=3, watts=1000, cooling=1.5, dollars_per_kwh=0.2, upkeep=0.1)
    # 26,298 dollars over three years of 8,766 hours is one dollar an hour; a tenth a year is 0.3; 1.5 kW at 0.2 is 0.3.
    assert own.dollars_per_hour == pytest.approx(1.0 + 0.3 + 0.3)


def test_an_api_is_paid_for_prompts_and_answers() -> None:
    # Three tokens of prompt at 0.1 for each token of answer at 0.4.
    assert api_per_million(Api(input=0.1, output=0.4), CARRIED) == pytest.approx(0.7)


def test_the_break_even_is_where_both_bills_are_equal() -> None:
    api = Api(input=0.1, output=4.0)
    requests = break_even(3.6, api, CARRIED)
    assert requests is not None
    assert requests * (100 * 4.0 + 300 * 0.1) / 1e6 == pytest.approx(24 * 3.6)
    assert requests < CARRIED.requests_per_day


def test_an_api_that_is_cheaper_than_a_full_replica_is_never_beaten() -> None:
    assert break_even(3.6, Api(input=0.0, output=0.9), CARRIED) is None
    assert break_even(3.6, Api(input=0.0, output=1.01), CARRIED) is not None


def test_the_usual_day_has_a_mean_of_one_and_a_quarter_at_night() -> None:
    assert sum(USUAL_DAY) / 24 == pytest.approx(1)
    assert min(USUAL_DAY) / max(USUAL_DAY) == pytest.approx(0.25)
    assert USUAL_DAY.index(max(USUAL_DAY)) == 14


@given(st.floats(1, 1e8), st.floats(0.1, 1.0))
def test_no_hour_asks_more_of_a_replica_than_its_target(requests: float, target: float) -> None:
    plan = PLAN.model_copy(update={"target": target})
    needed = replicas_by_hour(plan, CARRIED, requests)
    for hour, count in enumerate(needed):
        rate = requests * plan.day[hour] / sum(plan.day) / 3600
        assert count >= 1
        assert rate / count <= target * CARRIED.requests_per_second * (1 + 1e-6)
        assert count == 1 or rate / (count - 1) > target * CARRIED.requests_per_second * (1 - 1e-6)


def test_a_hybrid_is_never_dearer_than_renting_all_or_owning_all() -> None:
    found = hybrids(PLAN, CARRIED, 2e6)
    dollars = [each.dollars_per_day for each in found]
    needed = replicas_by_hour(PLAN, CARRIED, 2e6)
    assert dollars[0] == pytest.approx(3.6 * sum(needed))
    assert dollars[-1] == pytest.approx(24 * Own(dollars=30000).dollars_per_hour * max(needed))
    assert found[-1].rented_hours == 0
    assert min(dollars) <= min(dollars[0], dollars[-1])


def test_the_throughput_is_the_capacity_where_that_was_searched_for() -> None:
    load, requests = load_evidence.measured(), load_evidence.requests()
    sent = throughput(load, requests)
    assert sent is not None
    assert (sent.requests_per_second, sent.at_slo) == (load.metrics["requests_per_second"], False)
    assert sent.prompt_tokens == 64
    assert sent.answer_tokens == pytest.approx(32)
    capacity = load_evidence.searched(8.0, 11.0, [load_evidence.step(8)])
    carried = throughput(load.model_copy(update={"capacity": capacity}), requests)
    assert carried is not None
    assert (carried.requests_per_second, carried.output_tokens_per_second, carried.at_slo) == (8, 256, True)
    assert throughput(load, [RequestRecord(number=0, due_ms=0, error="timeout")]) is None
    assert throughput(load.model_copy(update={"metrics": {}}), requests) is None


def test_prompts_are_those_of_the_profile_whose_rate_it_is() -> None:
    others = [row.model_copy(update={"profile": "rag", "input_tokens": 3000}) for row in load_evidence.requests()]
    carried = throughput(load_evidence.measured(), [*load_evidence.requests(), *others])
    assert carried is not None
    assert carried.prompt_tokens == 64


def test_the_document_is_json_and_says_what_it_rests_on() -> None:
    found = parse_cost(cost_evidence(PLAN, CARRIED).format(), "cost.json")
    assert found == cost_evidence(PLAN, CARRIED)
    assert json.loads(found.format())["throughput"]["requests_per_day"] == 864_000
    assert [row.what for row in found.rows] == [
        "cloud, always busy", "cloud, 70% busy", "own hardware, 50% busy", "API",
    ]  # fmt: skip
    told = sentences(found)
    assert "one replica carries 10 requests/s at its service level" in told
    assert any("a day of 2,000,000 requests costs least with" in line for line in told)
    assert "renting costs more than the API at any load that one replica can carry" in told


def test_what_was_not_searched_for_is_said() -> None:
    carried = CARRIED.model_copy(update={"at_slo": False})
    assert "its capacity was not searched for" in sentences(cost_evidence(PLAN, carried))[0]


def test_a_plan_with_one_price_leaves_the_rest_out() -> None:
    found = cost_evidence(CostPlan(cloud=Cloud(dollars_per_hour=1)), CARRIED)
    assert (len(found.rows), found.break_even, found.day) == (2, {}, None)
    assert cost_pictures.day(found) is None
    assert cost_evidence(CostPlan(), CARRIED).rows == ()
    assert cost_pictures.per_million(cost_evidence(CostPlan(), CARRIED)) is None


def test_a_day_has_twenty_four_hours() -> None:
    with pytest.raises(ValidationError, match="at least 24"):
        CostPlan(day=(1.0, 2.0))


def test_the_pictures_show_every_bar_and_every_hour() -> None:
    found = cost_evidence(PLAN, CARRIED)
    bars = cost_pictures.per_million(found)
    assert bars is not None
    assert all(row.what in bars for row in found.rows)
    day = cost_pictures.day(found)
    assert day is not None
    assert "2,000,000 requests a day" in day
    assert day == cost_pictures.day(found)


def test_the_report_has_the_table_the_pictures_and_what_they_come_to() -> None:
    subject = report.ReportedRelease("demo", "awq", "2026-11-24T01:02:03Z")
    with_prices = report.render(subject, (), report.ReportEvidence(cost=cost_evidence(PLAN, CARRIED)))
    without = report.render(subject, (), report.ReportEvidence())
    assert with_prices.count("<svg") == without.count("<svg") + 2
    for words in ("own hardware, 50% busy", "$ for a million output tokens", "costs least with"):
        assert words in with_prices
        assert words not in without
