"""The slope of a series with its interval: for a queue over a step of load, and for memory over a long test."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import special

from evals.statistics.paired import Interval

_BLOCKS = 12


def slope(times: Sequence[float], values: Sequence[float], confidence: float = 0.95, blocks: int = _BLOCKS) -> Interval:
    """Return how fast ``values`` grow, a unit of time, with its interval.

    Theil's median of pairwise slopes over the means of ``blocks`` equal stretches of time, with Sen's interval by ranks
    (Journal of the American Statistical Association 63:1379-1389, 1968). Blocks remove the correlation within each;
    medians are robust to a single jump, which is not a slope.

    Raises:
        ValueError: fewer than five blocks hold a value.
    """
    at, means = _block_means(np.asarray(times, dtype=float), np.asarray(values, dtype=float), blocks)
    count = len(at)
    if count < 5:
        raise ValueError(f"{len(values)} values in {count} stretches of time are too few for a slope")
    first, second = np.triu_indices(count, 1)
    slopes = np.sort((means[second] - means[first]) / (at[second] - at[first]))
    spread = special.ndtri(0.5 + confidence / 2) * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    low = max(0, round((len(slopes) - spread) / 2) - 1)
    high = min(len(slopes) - 1, round((len(slopes) + spread) / 2))
    return Interval(float(np.median(slopes)), float(slopes[low]), float(slopes[high]))


def _block_means(
    times: NDArray[np.float64], values: NDArray[np.float64], blocks: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if not len(times) or times[-1] <= times[0]:
        return np.empty(0), np.empty(0)
    which = np.minimum(((times - times[0]) / (times[-1] - times[0]) * blocks).astype(int), blocks - 1)
    counts = np.bincount(which, minlength=blocks)
    held = counts > 0
    sums = (np.bincount(which, weights=each, minlength=blocks)[held] for each in (times, values))
    at, means = (total / counts[held] for total in sums)
    return at, means
