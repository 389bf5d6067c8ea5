"""Traffic profiles and the requests that follow from them."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from evals.load.traffic.profile import Arrivals, Lengths, TrafficProfile, TrafficProfileError, names, read_profile
from evals.load.traffic.schedule import arrivals, plan


def chance(seed: int = 1) -> random.Random:
    return random.Random(seed)


def variation(due: list[int]) -> float:
    gaps = [later - earlier for earlier, later in itertools.pairwise(due)]
    return statistics.stdev(gaps) / statistics.mean(gaps)


def test_the_profiles_that_the_documentation_names_are_there() -> None:
    assert {"quick", "chat", "rag", "summarize", "burst", "soak"} <= set(names())


@pytest.mark.parametrize("name", names())
def test_a_profile_is_what_it_says(name: str) -> None:
    profile = read_profile(name)
    made = plan(profile)
    due = [request.due_ms for request in made.requests]
    inputs = [request.input_tokens for request in made.requests]
    assert len(due) == profile.requests
    assert due == sorted(due)
    assert due[0] >= 0
    assert due[-1] < 1000 * profile.seconds
    assert len(made.warmup) == profile.warmup_requests
    assert {profile.input_tokens.lowest <= tokens <= profile.input_tokens.highest for tokens in inputs} == {True}
    assert statistics.median(inputs) == pytest.approx(profile.input_tokens.median, rel=0.25)
    assert plan(profile) == made


def test_poisson_arrivals_scatter_as_such_and_even_ones_do_not() -> None:
    assert variation(arrivals(Arrivals(), 5000, 100, chance())) == pytest.approx(1, abs=0.1)
    assert variation(arrivals(Arrivals(process="even"), 5000, 100, chance())) < 0.05
    clustered = arrivals(Arrivals(process="gamma", burstiness=3), 5000, 100, chance())
    assert variation(clustered) == pytest.approx(3, rel=0.2)


def test_arrivals_follow_the_seed() -> None:
    assert arrivals(Arrivals(), 50, 10, chance()) == arrivals(Arrivals(), 50, 10, chance())
    assert arrivals(Arrivals(), 50, 10, chance()) != arrivals(Arrivals(), 50, 10, chance(2))


def test_a_burst_has_ten_times_the_rate_of_the_quiet_around_it() -> None:
    profile = read_profile("burst").model_copy(update={"rate": 20.0})
    due = [request.due_ms / 1000 for request in plan(profile).requests]
    quiet = sum(at < 60 for at in due) / 60
    burst = sum(60 <= at < 75 for at in due) / 15
    assert burst / quiet == pytest.approx(10, rel=0.15)


def test_shared_beginnings_come_from_few_texts() -> None:
    made = plan(read_profile("rag"))
    assert len(made.prefix_tokens) == 12
    assert {request.prefix for request in made.requests} <= set(range(12))
    assert plan(read_profile("chat")).requests[0].prefix is None


def test_lognormal_lengths_have_the_median_and_the_p95_that_were_asked_for() -> None:
    profile = read_profile("chat").model_copy(
        update={"rate": 100.0, "input_tokens": Lengths(median=200, p95=800, maximum=10**6, minimum=1)}
    )
    drawn = sorted(request.input_tokens for request in plan(profile).requests)
    assert drawn[len(drawn) // 2] == pytest.approx(200, rel=0.05)
    assert drawn[int(0.95 * len(drawn))] == pytest.approx(800, rel=0.08)


@given(st.sampled_from(names()), st.integers(64, 8192))
def test_traffic_is_shortened_to_a_context_and_never_lengthened(name: str, context: int) -> None:
    profile = read_profile(name)
    fitted = profile.fitted(context)
    assert fitted.longest <= max(context - 8, 8)
    assert (fitted is profile) == (profile.longest <= context - 8)
    assert fitted.requests == profile.requests


def test_a_number_is_a_fixed_length() -> None:
    fixed = Lengths.model_validate(64)
    assert (fixed.lowest, fixed.median, fixed.highest, fixed.sigma) == (64, 64, 64, 0.0)


@pytest.mark.parametrize(
    "lengths", [{"median": 10, "p95": 5}, {"median": 0}, {"median": 10, "maximum": 5}, {"mean": 4}]
)
def test_lengths_that_can_not_be_are_refused(lengths: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        Lengths.model_validate(lengths)


@pytest.mark.parametrize(
    "given_",
    [
        {"process": "uniform"},
        {"burstiness": 2},
        {"shape": [{"share": 0.5, "times": 1}]},
        {"burstiness": math.inf, "process": "gamma"},
    ],
)
def test_arrivals_that_can_not_be_are_refused(given_: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Arrivals.model_validate(given_)


def test_a_name_that_is_nearly_right_is_answered_with_the_right_one() -> None:
    with pytest.raises(TrafficProfileError, match="did you mean `summarize`"):
        read_profile("sumarize")


def test_a_wrong_file_is_told_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("description: x\nrate: 1\nsecond: 10\ninput_tokens: 4\noutput_tokens: 4\n")
    with pytest.raises(TrafficProfileError, match=r"mine\.yaml: .*`second`"):
        read_profile("mine", tmp_path)


def test_a_profile_without_a_request_is_refused() -> None:
    with pytest.raises(ValidationError, match="less than one request"):
        TrafficProfile.model_validate({**dict(read_profile("quick")), "rate": 0.01})
