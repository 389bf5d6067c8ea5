"""Paired statistics against definitions worked out another way, published numbers, and simulation."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import optimize, stats

from evals.statistics.paired import (
    Flips,
    detectable_drop,
    drop_interval,
    mcnemar_worse,
    ratio_interval,
    share_interval,
    shared,
)


def test_mcnemar_is_the_binomial_tail() -> None:
    expected = sum(math.comb(12, k) for k in range(9, 13)) / 2**12
    assert mcnemar_worse(Flips(100, 9, 3)) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_agrees_with_an_exact_binomial_test() -> None:
    for lost, gained in [(0, 4), (4, 0), (17, 5), (30, 30), (120, 80)]:
        exact = stats.binomtest(lost, lost + gained, 0.5, alternative="greater").pvalue
        assert mcnemar_worse(Flips(1000, lost, gained)) == pytest.approx(exact, rel=1e-12)


def test_mcnemar_without_flips_is_no_evidence() -> None:
    assert mcnemar_worse(Flips(500, 0, 0)) == 1.0


@pytest.mark.parametrize(("items", "lost", "gained"), [(-1, 0, 0), (10, -1, 0), (10, 6, 5)])
def test_counts_that_cannot_be_are_refused(items: int, lost: int, gained: int) -> None:
    with pytest.raises(ValueError, match="fit into"):
        Flips(items, lost, gained)


def _profile_score(flips: Flips, delta: float) -> float:
    """Tango's statistic from its definition: maximise the multinomial likelihood numerically at a fixed drop."""
    both = flips.items - flips.lost - flips.gained

    def surprise(gain: float) -> float:
        cells = [(flips.gained, gain), (flips.lost, gain + delta), (both, 1 - 2 * gain - delta)]
        return -sum(count * math.log(probability) for count, probability in cells if count)

    low, high = max(0.0, -delta) + 1e-12, (1 - delta) / 2 - 1e-12
    gain = optimize.minimize_scalar(surprise, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    variance = flips.items * (2 * gain + delta * (1 - delta))
    return (flips.lost - flips.gained - flips.items * delta) / math.sqrt(variance)


@pytest.mark.parametrize("flips", [Flips(800, 22, 18), Flips(50, 7, 1), Flips(2000, 60, 5), Flips(40, 3, 9)])
def test_both_ends_of_the_drop_solve_the_score_equation(flips: Flips) -> None:
    z = float(stats.norm.ppf(0.975))
    interval = drop_interval(flips, 0.95)
    assert _profile_score(flips, interval.lower) == pytest.approx(z, abs=1e-4)
    assert _profile_score(flips, interval.upper) == pytest.approx(-z, abs=1e-4)
    assert interval.lower < interval.estimate < interval.upper


def test_no_flip_still_leaves_a_width() -> None:
    """With no discordant pair Tango's ends are at z^2 / (n + z^2) on either side (Tango 1998, section 3)."""
    z2 = float(stats.norm.ppf(0.975)) ** 2
    interval = drop_interval(Flips(100, 0, 0), 0.95)
    assert interval.upper == pytest.approx(z2 / (100 + z2), rel=1e-6)
    assert interval.lower == pytest.approx(-z2 / (100 + z2), rel=1e-6)


def test_swapping_the_models_mirrors_the_interval() -> None:
    one, other = drop_interval(Flips(300, 20, 4), 0.9), drop_interval(Flips(300, 4, 20), 0.9)
    assert (one.lower, one.upper) == pytest.approx((-other.upper, -other.lower), abs=1e-9)


@pytest.mark.parametrize("flips", [Flips(1, 1, 0), Flips(1, 0, 1), Flips(5, 5, 0), Flips(5, 0, 5), Flips(1, 0, 0)])
def test_extremes_stay_within_bounds(flips: Flips) -> None:
    interval = drop_interval(flips, 0.95)
    assert -1 <= interval.lower <= interval.estimate <= interval.upper <= 1


def test_more_items_narrow_the_interval_and_more_confidence_widens_it() -> None:
    widths = [drop_interval(Flips(100 * k, 4 * k, 3 * k), 0.95) for k in (1, 4, 16, 64)]
    assert all(a.upper - a.lower > b.upper - b.lower for a, b in pairwise(widths))
    wide, narrow = drop_interval(Flips(100, 4, 3), 0.99), drop_interval(Flips(100, 4, 3), 0.8)
    assert wide.lower < narrow.lower < narrow.upper < wide.upper


def test_the_drop_is_covered_as_often_as_promised() -> None:
    rng = np.random.default_rng(7)
    draws = rng.multinomial(400, [0.03, 0.02, 0.95], size=1500)
    covered = 0
    for lost, gained, _ in draws:
        interval = drop_interval(Flips(400, int(lost), int(gained)), 0.95)
        covered += interval.lower <= 0.01 <= interval.upper
    assert 0.935 < covered / len(draws) < 0.968


@pytest.mark.parametrize("confidence", [0.0, 1.0, -0.1, 95.0, math.nan])
def test_a_confidence_outside_its_range_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        drop_interval(Flips(10, 1, 1), confidence)


def test_a_drop_over_no_items_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one item"):
        drop_interval(Flips(0, 0, 0), 0.95)


def test_the_ratio_is_of_sums_and_not_a_mean_of_ratios() -> None:
    interval = ratio_interval([1.0, 9.0, 5.0], [2.0, 9.0, 5.0], 0.95)
    assert interval.estimate == pytest.approx(16 / 15)


def test_the_ratio_agrees_with_a_bootstrap_over_documents() -> None:
    rng = np.random.default_rng(3)
    baseline = rng.gamma(20.0, 20.0, size=300)
    candidate = baseline * 1.01 + rng.normal(0, 4.0, size=300)
    interval = ratio_interval(baseline.tolist(), candidate.tolist(), 0.95)
    drawn = rng.integers(0, 300, size=(4000, 300))
    ratios = candidate[drawn].sum(axis=1) / baseline[drawn].sum(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    assert interval.lower == pytest.approx(low, abs=1.5e-4)
    assert interval.upper == pytest.approx(high, abs=1.5e-4)


def test_pairing_makes_the_ratio_far_sharper_than_pooling() -> None:
    rng = np.random.default_rng(4)
    baseline = rng.gamma(4.0, 100.0, size=200)
    candidate = baseline * rng.normal(1.01, 0.005, size=200)
    paired = ratio_interval(baseline.tolist(), candidate.tolist(), 0.95)
    pooled = ratio_interval(baseline.tolist(), rng.permutation(candidate).tolist(), 0.95)
    assert (paired.upper - paired.lower) * 20 < pooled.upper - pooled.lower


def test_equal_documents_have_ratio_one_and_no_width() -> None:
    interval = ratio_interval([3.0, 4.0], [3.0, 4.0], 0.95)
    assert (interval.lower, interval.estimate, interval.upper) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("baseline", "candidate", "message"),
    [
        ([1.0, 2.0], [1.0], "pairs were expected"),
        ([1.0], [1.0], "at least two"),
        ([1.0, math.nan], [1.0, 1.0], "not finite"),
        ([1.0, 1.0], [1.0, math.inf], "not finite"),
        ([0.0, 0.0], [1.0, 1.0], "more than zero"),
    ],
)
def test_documents_that_make_no_pairs_are_refused(baseline: list[float], candidate: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ratio_interval(baseline, candidate, 0.95)


def test_a_share_has_the_exact_interval() -> None:
    expected = stats.binomtest(200, 800).proportion_ci(0.95, method="exact")
    interval = share_interval(200, 800, 0.95)
    assert (interval.lower, interval.upper) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert share_interval(0, 10, 0.95).lower == 0.0
    assert share_interval(10, 10, 0.95).upper == 1.0


@pytest.mark.parametrize(("successes", "items"), [(0, 0), (-1, 5), (6, 5)])
def test_no_share_is_refused(successes: int, items: int) -> None:
    with pytest.raises(ValueError, match="a share of items"):
        share_interval(successes, items, 0.95)


def test_a_point_takes_the_published_number_of_items() -> None:
    """arXiv 2605.28873: 1 point at 10% flips about 7,850 paired items, at 5% about 3,900."""
    assert detectable_drop(0.10, 7850, 0.95) == pytest.approx(0.01, rel=2e-3)
    assert detectable_drop(0.05, 3925, 0.95) == pytest.approx(0.01, rel=2e-3)
    assert detectable_drop(0.1, 0, 0.95) == math.inf


def test_confidence_is_shared_among_tests() -> None:
    assert shared(0.95, 1) == pytest.approx(0.95)
    assert shared(0.95, 5) == pytest.approx(0.99)
