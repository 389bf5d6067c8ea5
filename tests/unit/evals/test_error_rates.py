"""The gate's stated rates by simulation: how often it fails what is good, and passes what is not.

2,000 trials a point. A rate holds unless so many errors would come by chance less often than once in a thousand.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from evals.drift.drift_gate import judge
from evals.drift.limits import DriftLimits
from evals.drift.pairs import ChoicePairs, DocumentPair, Drift, TextPairs
from evals.statistics.paired import Flips, clustered_drop_loss, drop_loss, increase_loss
from evals.statistics.sequential import bounds
from unit.evals.simulated import outcomes, p_values

TRIALS = 2000
RATE = 0.025  # beyond each end of an interval of 95%
MOST = stats.binom.ppf(0.999, TRIALS, RATE) / TRIALS
GRID = list(itertools.product((200, 1000, 5000), (0.02, 0.05, 0.10)))
LIMIT = 0.01


@pytest.mark.parametrize("looks", [1, 4])
@pytest.mark.parametrize(("items", "flips"), GRID)
def test_without_drift_the_gate_fails_at_most_at_its_rate(items: int, flips: float, looks: int) -> None:
    assert outcomes(items, flips, 0.0, LIMIT, TRIALS, looks)[1] <= MOST


@pytest.mark.parametrize("looks", [1, 4])
@pytest.mark.parametrize(("items", "flips"), GRID)
def test_a_drop_of_the_margin_passes_and_fails_at_most_at_its_rate(items: int, flips: float, looks: int) -> None:
    """The worst case of both promises at once: the truth is the margin."""
    passed, failed = outcomes(items, flips, LIMIT, LIMIT, TRIALS, looks)
    assert passed <= MOST
    assert failed <= MOST


@pytest.mark.parametrize(("items", "flips"), GRID)
def test_a_drop_beyond_the_margin_passes_less_often_still(items: int, flips: float) -> None:
    assert outcomes(items, flips, 1.5 * LIMIT, LIMIT, TRIALS)[0] <= RATE


@pytest.mark.parametrize(("items", "flips"), GRID)
def test_the_rates_hold_exactly_and_not_only_in_trials(items: int, flips: float) -> None:
    """Every outcome that can come, with its probability: at the margin neither error exceeds the stated rate."""
    passed = failed = 0.0
    for count in range(int(items * flips + 12 * np.sqrt(items * flips)) + 30):
        lost = np.arange(count + 1)
        weight = stats.binom.pmf(count, items, flips) * stats.binom.pmf(lost, count, (flips + LIMIT) / 2 / flips)
        within, beyond = p_values(items, lost, count - lost, LIMIT)
        passed += float(weight[within <= RATE].sum())
        failed += float(weight[beyond <= RATE].sum())
    assert passed <= RATE
    assert failed <= RATE


def test_the_trials_are_judged_as_the_gate_judges() -> None:
    random = np.random.default_rng(3)
    counts = random.multinomial(1000, [0.035, 0.02, 0.945], size=40)
    limits = DriftLimits.model_validate(
        {
            "tasks": {"cloze": {"data": "c", "max_drop": 0.02}, "perplexity": {"data": "t", "max_increase": 0.01}},
            "divergence": None,
        }
    )
    within, beyond = p_values(1000, counts[:, 0], counts[:, 1], 0.02)
    for number, (lost, gained, _) in enumerate(counts):
        loss = drop_loss(Flips(1000, int(lost), int(gained)), 0.02, 0.95)
        assert (loss.within, loss.beyond) == pytest.approx((within[number], beyond[number]))
        status = judge(_drift(int(lost), int(gained), limits), limits).status
        expected = "fail" if beyond[number] * 2 <= RATE else "pass" if within[number] <= RATE else "inconclusive"
        assert status == expected  # twice: Holm over two tasks


def _drift(lost: int, gained: int, limits: DriftLimits) -> Drift:
    documents = tuple(
        DocumentPair(id=str(number), bytes=100, baseline_nats=100.0, candidate_nats=100.0 + number % 3 / 100)
        for number in range(60)
    )
    return Drift.model_validate(
        {
            "engine": {}, "engine_differences": (), "suite": {"name": "s", "digest": limits.digest, "lm_eval": "0"},
            "tasks": {
                "cloze": ChoicePairs(
                    items=1000, baseline_missing=0, candidate_missing=0, baseline_right=900,
                    candidate_right=900 - lost + gained, changed=lost + gained, chance=0.25,
                    lost_ids=tuple(map(str, range(lost))), gained_ids=tuple(map(str, range(gained))),
                ),
                "perplexity": TextPairs(documents=documents, baseline_missing=0, candidate_missing=0),
            },
        }
    )  # fmt: skip


def test_looking_early_without_spending_would_break_the_promise() -> None:
    """What the spending is for: four looks at the full rate pass a drop of the margin far too often."""
    random = np.random.default_rng(1)
    counts = np.cumsum(random.multinomial(500, [0.03, 0.02, 0.95], size=(4, TRIALS)), axis=0)
    passed = np.zeros(TRIALS, dtype=bool)
    for look in range(4):
        passed |= p_values(500 * (look + 1), counts[look, :, 0], counts[look, :, 1], LIMIT)[0] <= RATE
    assert passed.mean() > MOST


def test_looking_early_saves_items_where_the_answer_is_clear() -> None:
    """At the first of four looks a drop of four margins is already sure."""
    assert outcomes(2500, 0.10, 4 * LIMIT, LIMIT, TRIALS, looks=1)[1] > 0.9


def test_the_bounds_are_those_of_the_tables() -> None:
    """Lan-DeMets with O'Brien-Fleming's shape, one-sided 0.025, four even looks: R's ldbounds gives these."""
    assert bounds([0.25, 0.5, 0.75, 1.0], 0.025) == pytest.approx((4.3326, 2.9631, 2.3590, 2.0141), abs=5e-4)
    assert bounds([1.0], 0.025) == pytest.approx((stats.norm.ppf(0.975),), abs=1e-4)


@pytest.mark.parametrize("fractions", [[], [0.5], [0.5, 0.4, 1.0], [0.0, 1.0]])
def test_looks_that_do_not_grow_to_the_whole_are_refused(fractions: list[float]) -> None:
    with pytest.raises(ValueError, match="looks must grow"):
        bounds(fractions, 0.025)


def test_clustered_items_need_the_clustered_interval() -> None:
    """Subjects that move together: pooled, a drop of the margin passes too often; by subject it does not."""
    random = np.random.default_rng(2)
    pooled = clustered = 0
    trials = 400
    for _ in range(trials):
        shifts = random.normal(LIMIT, 0.04, size=40).clip(-0.09, 0.09)
        counts = [random.multinomial(100, [0.05 + s / 2, 0.05 - s / 2, 0.90]) for s in shifts]
        groups = [Flips(100, int(lost), int(gained)) for lost, gained, _ in counts]
        whole = Flips(4000, sum(g.lost for g in groups), sum(g.gained for g in groups))
        pooled += drop_loss(whole, LIMIT, 0.95).within <= RATE
        clustered += clustered_drop_loss(groups, LIMIT, 0.95).within <= RATE
    assert pooled / trials > 0.04
    assert clustered / trials <= stats.binom.ppf(0.999, trials, RATE) / trials


def test_likelihood_errs_at_most_at_its_rate() -> None:
    random = np.random.default_rng(4)
    wrong = [0, 0]
    for _ in range(TRIALS):
        baseline = random.gamma(4.0, 100.0, size=60)
        candidate = baseline * random.normal(1.01, 0.01, size=60)
        loss = increase_loss(baseline.tolist(), candidate.tolist(), 0.01, 0.95)
        wrong[0] += loss.within <= RATE
        wrong[1] += loss.beyond <= RATE
    assert max(wrong) / TRIALS <= MOST
