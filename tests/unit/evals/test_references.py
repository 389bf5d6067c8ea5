"""Our statistics against other people's: statsmodels, scipy, and lm-evaluation-harness's own comparison."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep

from evals.statistics.paired import (
    Flips,
    clustered_drop_loss,
    detectable_drop,
    drop_interval,
    drop_loss,
    holm,
    items_to_detect,
    mcnemar_worse,
    mean_loss,
)
from evals.statistics.resampling import drop_bootstrap, ratio_bootstrap

SAMPLES = [Flips(800, 31, 14), Flips(2000, 12, 30), Flips(400, 9, 9), Flips(5000, 150, 90)]


@pytest.mark.parametrize("flips", SAMPLES)
def test_mcnemar_agrees_with_statsmodels(flips: Flips) -> None:
    """Theirs is two-sided: twice the smaller tail, at most 1."""
    table = [[flips.items // 2, flips.lost], [flips.gained, 0]]
    mirrored = Flips(flips.items, flips.gained, flips.lost)
    ours = min(1.0, 2 * min(mcnemar_worse(flips), mcnemar_worse(mirrored)))
    assert ours == pytest.approx(mcnemar(table, exact=True).pvalue, rel=1e-9)


def lm_eval_z(flips: Flips, baseline_right: int) -> float:
    """lm-evaluation-harness, scripts/model_comparator.py: Z = (acc1 - acc2) / sqrt(stderr1^2 + stderr2^2)."""
    right = np.array([baseline_right, baseline_right - flips.lost + flips.gained]) / flips.items
    errors = np.sqrt(right * (1 - right) / (flips.items - 1))  # its `acc_stderr`, over ones and zeros
    return float((right[0] - right[1]) / math.sqrt(float((errors**2).sum())))


def test_lm_eval_s_own_comparison_agrees_on_the_estimate_and_is_blind_to_the_pairing() -> None:
    """Issue 3831's case: 220 items, unpaired p 0.080, paired p 0.008 and less. The estimate is the same."""
    flips, right = Flips(220, 22, 6), 170
    unpaired = 2 * stats.norm.sf(abs(lm_eval_z(flips, right)))
    paired = mcnemar([[148, flips.lost], [flips.gained, 44]], exact=True).pvalue
    assert unpaired > 0.05
    assert paired < 0.01
    assert 2 * mcnemar_worse(flips) == pytest.approx(paired)
    assert drop_loss(flips, 0.0, 0.95).interval.lower > 0


def test_unpaired_answers_get_about_the_unpaired_interval() -> None:
    """Where the two models' answers have nothing to do with one another, pairing gains nothing: ours is near theirs."""
    items, first, second = 4000, 0.8, 0.78
    flips = Flips(items, round(items * first * (1 - second)), round(items * second * (1 - first)))
    low, high = confint_proportions_2indep(3200, items, 3120, items, method="newcomb", compare="diff")
    interval = drop_interval(flips, 0.95)
    assert (interval.lower, interval.upper) == pytest.approx((low, high), abs=4e-4)


def test_holm_agrees_with_statsmodels() -> None:
    values = {"a": 0.012, "b": 0.2, "c": 0.0004, "d": 0.03, "e": 0.011}
    expected = multipletests(list(values.values()), method="holm")[1]
    assert [holm(values)[name] for name in values] == pytest.approx(list(expected))


def test_holm_of_nothing_is_nothing() -> None:
    assert holm({}) == {}


@pytest.mark.parametrize("flips", SAMPLES)
def test_the_paired_bootstrap_agrees_with_the_formula(flips: Flips) -> None:
    formula, resampled = drop_interval(flips, 0.95), drop_bootstrap([flips], 0.95, resamples=8000)
    assert resampled.estimate == formula.estimate
    step = 1.2 / flips.items  # resampled counts are whole
    assert (resampled.lower, resampled.upper) == pytest.approx((formula.lower, formula.upper), abs=max(1e-3, step))


def test_the_bootstrap_agrees_with_scipy_s() -> None:
    moved = np.repeat([1.0, -1.0, 0.0], [31, 14, 755])
    theirs = stats.bootstrap((moved,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    ours = drop_bootstrap([Flips(800, 31, 14)], 0.95, resamples=4000)
    assert (ours.lower, ours.upper) == pytest.approx((theirs.low, theirs.high), abs=2e-3)


def test_one_group_is_no_cluster_and_even_groups_change_little() -> None:
    alone = clustered_drop_loss([Flips(1000, 30, 20)], 0.01, 0.95)
    assert alone == drop_loss(Flips(1000, 30, 20), 0.01, 0.95)
    even = clustered_drop_loss([Flips(100, 3, 2)] * 10, 0.01, 0.95)
    assert even.interval == alone.interval  # they don't differ at all, and that promises nothing


def test_the_clustered_interval_agrees_with_a_bootstrap_of_groups() -> None:
    random = np.random.default_rng(5)
    counts = [random.multinomial(100, [0.03 + s, 0.03 - s, 0.94]) for s in random.uniform(-0.02, 0.03, size=60)]
    groups = [Flips(100, int(lost), int(gained)) for lost, gained, _ in counts]
    formula, resampled = clustered_drop_loss(groups, 0.01, 0.95).interval, drop_bootstrap(groups, 0.95, 8000)
    assert (resampled.lower, resampled.upper) == pytest.approx((formula.lower, formula.upper), abs=1.5e-3)


def test_the_block_bootstrap_repeats_and_needs_two_documents() -> None:
    baseline, candidate = [100.0, 200.0, 150.0], [101.0, 203.0, 151.0]
    assert ratio_bootstrap(baseline, candidate, 0.95) == ratio_bootstrap(baseline, candidate, 0.95)
    with pytest.raises(ValueError, match="two pairs"):
        ratio_bootstrap([1.0], [1.0], 0.95)


def test_a_mean_over_documents_is_weighted_by_their_positions() -> None:
    loss = mean_loss([1.0, 6.0, 2.0], [10, 30, 20], 0.2, 0.95)
    assert loss.interval.estimate == pytest.approx(9 / 60)
    assert loss.within + loss.beyond == pytest.approx(1)


def test_items_and_drops_that_can_be_detected_are_inverse() -> None:
    items = items_to_detect(0.05, 0.01, 0.95)
    assert items == pytest.approx(3900, rel=0.01)  # arXiv 2605.28873
    assert detectable_drop(0.05, items, 0.95) == pytest.approx(0.01, rel=1e-3)
