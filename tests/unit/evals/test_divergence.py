"""The lower bound of the divergence: tight where all is known, honest where the tops differ, and gross damage shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import optimize

from evals.drift.divergence import Top, agreement, by_bucket, by_document, kl, read_top
from evals.errors import AnswersError
from evals.statistics.paired import Floats


def top(distributions: Floats, count: int) -> Top:
    """The likeliest tokens of whole distributions, positions by vocabulary."""
    tokens = np.argsort(-distributions, axis=1)[:, :count]
    rows = np.arange(len(distributions))
    values = np.log(np.take_along_axis(distributions, tokens, axis=1))
    return Top(tokens, values, np.zeros_like(rows), rows)


def drawn(seed: int, rows: int = 40, tokens: int = 60, sharpness: float = 0.1) -> Floats:
    return np.random.default_rng(seed).dirichlet(np.full(tokens, sharpness), size=rows) * (1 - 1e-6) + 1e-6 / tokens


def exact(p: Floats, q: Floats) -> NDArray[np.float64]:
    return np.asarray((p * np.log(p / q)).sum(axis=1))


def test_with_every_token_kept_it_is_the_divergence_itself() -> None:
    p, q = drawn(1), drawn(2)
    assert kl(top(p, 60), top(q, 60)) == pytest.approx(exact(p, q), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("count", [1, 5, 20, 50])
def test_it_never_overstates_and_more_tokens_tell_more(count: int) -> None:
    p, q = drawn(3), drawn(4)
    found = kl(top(p, count), top(q, count))
    assert (found <= exact(p, q) + 1e-9).all()
    assert (found >= -1e-9).all()
    assert found.mean() <= kl(top(p, count + 5), top(q, count + 5)).mean() + 1e-9


def test_near_distributions_are_told_almost_whole() -> None:
    p = drawn(5)
    q = p * np.exp(np.random.default_rng(6).normal(0, 0.05, size=p.shape))
    q /= q.sum(axis=1, keepdims=True)
    assert kl(top(p, 20), top(q, 20)).mean() == pytest.approx(exact(p, q).mean(), rel=0.1)


def test_equal_distributions_are_no_distance_apart() -> None:
    p = top(drawn(7), 20)
    assert kl(p, p) == pytest.approx(np.zeros(40), abs=1e-9)
    assert agreement(p, p).all()


def test_tops_without_a_token_in_common_are_far_apart() -> None:
    p, q = np.full((1, 60), 1e-4), np.full((1, 60), 1e-4)
    p[0, :5], q[0, 30:35] = 0.2 - 11e-4, 0.2 - 11e-4
    assert kl(top(p, 5), top(q, 5))[0] > 0.0
    sharp = np.full((1, 60), 1e-4)
    sharp[0, 59] = 1 - 59e-4
    assert kl(top(p, 5), top(sharp, 5))[0] > 3


def test_the_bound_is_the_least_that_fits_what_is_known() -> None:
    """Against a general optimiser over all that the candidate's distribution may be."""
    p, q = drawn(8, rows=1), drawn(9, rows=1)
    ours, theirs = top(p, 6), top(q, 6)
    known = dict(zip(theirs.tokens[0].tolist(), np.exp(theirs.log_probabilities[0]).tolist(), strict=True))
    free = [token for token in ours.tokens[0].tolist() if token not in known]
    mass = {token: float(p[0, token]) for token in ours.tokens[0].tolist()}
    rest = 1 - sum(mass.values())
    fixed = sum(mass[token] * np.log(mass[token] / known[token]) for token in mass if token in known)
    left = 1 - sum(known[token] for token in mass if token in known)
    elsewhere = sum(value for token, value in known.items() if token not in mass)
    weights = np.array([mass[token] for token in free] + [rest])

    def cost(logits: Floats) -> float:
        shares = np.exp(logits - logits.max())
        shares *= left / shares.sum()
        over = np.maximum(shares[:-1] - min(known.values()), 0).sum() + max(elsewhere - shares[-1], 0)
        return float(fixed + (weights * np.log(weights / shares)).sum() + 1e4 * over)

    tries = [optimize.minimize(cost, start, method="Nelder-Mead", options={"maxiter": 20000, "fatol": 1e-12}).fun
             for start in np.random.default_rng(1).normal(0, 2, size=(6, len(weights)))]  # fmt: skip
    assert kl(ours, theirs)[0] == pytest.approx(min(tries), rel=2e-2)


def test_buckets_and_documents_hold_every_position_once() -> None:
    first = top(drawn(10, rows=200), 5)
    where = Top(first.tokens, first.log_probabilities, np.repeat([0, 1], 100), np.tile(np.arange(100), 2))
    values = np.arange(200, dtype=np.float64)
    buckets = by_bucket(values, agreement(where, where), where)
    assert [bucket["start"] for bucket in buckets] == [0, 32]
    assert sum(bucket["positions"] for bucket in buckets) == 200
    assert by_document(values, where) == [(sum(range(100)), 100), (sum(range(100, 200)), 100)]


def test_other_positions_are_refused() -> None:
    with pytest.raises(AnswersError, match="different text"):
        kl(top(drawn(1), 5), top(drawn(1, rows=39), 5))


def test_a_damaged_file_is_refused_and_none_is_none(tmp_path: Path) -> None:
    assert read_top(tmp_path) is None
    (tmp_path / "top.npz").write_bytes(b"no archive")
    with pytest.raises(AnswersError, match="evaluate the model again"):
        read_top(tmp_path)


def test_a_log_probability_that_is_no_number_is_refused(tmp_path: Path) -> None:
    found = top(drawn(1, rows=4), 5)
    values = found.log_probabilities.copy()
    values[2, 1] = np.nan
    np.savez(
        tmp_path / "top.npz",
        tokens=found.tokens, log_probabilities=values, document=found.document, position=found.position,
    )  # fmt: skip
    with pytest.raises(AnswersError, match="not finite"):
        read_top(tmp_path)
