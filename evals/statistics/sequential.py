"""Looking early without paying for it in errors: alpha spending over growing prefixes of the items.

A gate that looks four times and stops at the first pass would err far more often than it says. Here each look may spend
a part of the error rate, little at first and all of it by the last (Lan and DeMets, Biometrika 70:659-663, 1983, with
O'Brien and Fleming's shape), and the bounds follow from the joint distribution of the looks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

from evals.statistics.paired import Floats

_STEPS = (
    400  # points of a look's density within what has not stopped; the bounds are right to 1e-4 with a quarter of it
)
_FAR = 8.0  # standard deviations; beyond them lies less than 1e-15


def spent(fraction: float, rate: float) -> float:
    """Return how much of a one-sided error ``rate`` may be spent when ``fraction`` of the items are answered.

    2 (1 - Phi(z(rate / 2) / sqrt(fraction))): O'Brien and Fleming's shape as Lan and DeMets give it.
    """
    return float(2 * special.ndtr(special.ndtri(rate / 2) / math.sqrt(fraction)))


def bounds(fractions: Sequence[float], rate: float) -> tuple[float, ...]:
    """Return each look's bound: a standard normal statistic beyond it may stop, at a one-sided error ``rate`` in all.

    ``fractions`` are the shares of the items answered at each look, growing, the last 1. The joint distribution of the
    looks is integrated as Armitage, McPherson and Rowe do (JRSS A 132:235-244, 1969): the sum of the items up to a
    look is the sum up to the look before, restricted to what did not stop there, and an independent part.

    Raises:
        ValueError: if the fractions don't grow to 1.
    """
    if list(fractions) != sorted(set(fractions)) or not fractions or fractions[0] <= 0 or fractions[-1] != 1:
        raise ValueError(f"looks must grow to 1, the whole suite; {list(fractions)} were given")
    found: list[float] = []
    places, density = np.zeros(1), np.ones(1)  # of the sum over items, in units where the whole has variance 1
    before, already = 0.0, 0.0
    for fraction in fractions:
        step = math.sqrt(fraction - before)
        allowed = spent(fraction, rate) - already
        bound = _crossing(places, density, step, allowed, math.sqrt(fraction))
        found.append(bound / math.sqrt(fraction))
        places, density = _carried(places, density, step, bound, math.sqrt(fraction))
        before, already = fraction, spent(fraction, rate)
    return tuple(found)


def levels(fractions: Sequence[float], rate: float) -> tuple[float, ...]:
    """Return the bounds as p-values: what is at most its look's level may stop there."""
    return tuple(float(special.ndtr(-bound)) for bound in bounds(fractions, rate))


def prefixes(items: int, fractions: Sequence[float]) -> tuple[int, ...]:
    """Return how many items are answered at each look; the last is all of them."""
    return tuple(max(1, round(items * fraction)) for fraction in fractions)


def _crossing(places: Floats, density: Floats, step: float, allowed: float, spread: float) -> float:
    """Return the value that the sum exceeds, for the first time at this look, with probability ``allowed``."""
    low, high = -_FAR * spread, _FAR * spread
    for _ in range(60):
        middle = (low + high) / 2
        above = float((density * special.ndtr((places - middle) / step)).sum())
        low, high = (middle, high) if above > allowed else (low, middle)
    return (low + high) / 2


def _carried(places: Floats, density: Floats, step: float, bound: float, spread: float) -> tuple[Floats, Floats]:
    """Return the distribution of the sum at this look over what did not stop, as points and their weights."""
    edges = np.linspace(-_FAR * spread, bound, _STEPS + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    reached = special.ndtr((edges[None, :] - places[:, None]) / step)
    return middles, (density[:, None] * np.diff(reached, axis=1)).sum(axis=0)
