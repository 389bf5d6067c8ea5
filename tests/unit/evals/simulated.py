"""Trials of the drift gate's accuracy rule on made-up answers, many at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import special

from evals.statistics.paired import CONTINUITY, drop_score, tail
from evals.statistics.sequential import levels, prefixes

Outcomes = tuple[float, float]  # the shares of trials that passed and that failed


def outcomes(
    items: int, flips: float, drop: float, limit: float, trials: int, looks: int = 1, seed: int = 1
) -> Outcomes:
    """Draw trials of so many paired items, so many of which flip and so many more are lost than gained; judge all."""
    random = np.random.default_rng(seed)
    shares = [(flips + drop) / 2, (flips - drop) / 2, 1 - flips]
    fractions = tuple(look / looks for look in range(1, looks + 1))
    rate = tail(0.95)
    allowed = levels(fractions, rate) if looks > 1 else (rate,)
    sizes = np.diff([0, *prefixes(items, fractions)])
    counts = np.cumsum([random.multinomial(size, shares, size=trials) for size in sizes], axis=0)
    passed, failed = np.zeros(trials, dtype=bool), np.zeros(trials, dtype=bool)
    for seen, level, count in zip(np.cumsum(sizes), allowed, counts, strict=True):
        open_ = ~(passed | failed)
        within, beyond = p_values(int(seen), count[:, 0], count[:, 1], limit)
        failed |= open_ & (beyond <= level)
        passed |= open_ & (within <= level) & ~failed
    return float(passed.mean()), float(failed.mean())


def p_values(
    items: int, lost: NDArray[np.int64], gained: NDArray[np.int64], limit: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The gate's two p-values of each trial, as `evals.statistics.paired.drop_loss` gives them one by one."""
    within = special.ndtr(drop_score(items, lost, gained, limit, CONTINUITY))
    beyond = special.ndtr(-drop_score(items, lost, gained, limit, -CONTINUITY))
    return np.asarray(within), np.asarray(beyond)
