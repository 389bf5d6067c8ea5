"""Does something grow? Slopes with intervals, for a queue over a step of load and for memory over a soak."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from evals.statistics.paired import Interval

_BLOCKS = 12
# A queue that grew by less than this share of all requests is a busy server's, not a saturated one's.
_MATERIAL_SHARE = 0.03
_MATERIAL_REQUESTS = 3.0
_CHANCE = 0.6


def slope(times: Sequence[float], values: Sequence[float], confidence: float = 0.95, blocks: int = _BLOCKS) -> Interval:
    """Return how fast ``values`` grow, a unit of time, with its interval.

    Theil's median of pairwise slopes over the means of ``blocks`` equal stretches of time, with Sen's interval by ranks
    (Journal of the American Statistical Association 63:1379-1389, 1968). Blocks take out what is correlated within one;
    medians shrug at a single jump, which is no slope.

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


@dataclass(frozen=True)
class Queue:
    """The requests in a server over the time in which they arrived.

    ``growth`` is in requests a second, with its interval; ``first`` and ``last`` are the mean numbers in the server in
    the first third and in the last tenth of the time; ``served_per_second`` is what it answered, and not with an error,
    in that time.
    """

    growth: Interval | None
    first: float
    last: float
    served_per_second: float
    growing: bool

    def document(self) -> dict[str, Any]:
        """As JSON."""
        interval = None if self.growth is None else [self.growth.estimate, self.growth.lower, self.growth.upper]
        return {
            "growth_per_second": interval, "in_server_first": self.first, "in_server_last": self.last,
            "served_per_second": self.served_per_second, "growing": self.growing,
        }  # fmt: skip


def queue(rows: Sequence[Mapping[str, Any]], seconds: float) -> Queue:
    """Tell a queue that grows, the mark of saturation, from one that is merely long.

    ``rows`` are requests with ``due_ms``, ``start_ms`` where they were sent and ``end_ms`` where they came back. They
    are in the server from their start on, so that a client that sends late is not taken for a server's queue. Three
    things must hold: the slope of the number in the server is certainly positive; the last tenth of the time holds half
    as many again as the first third; and the growth is more than 3% of the requests and more than chance makes of a
    busy server's queue, which goes with the root of their number. The time in which an empty server fills is left out.
    As exactly rate times time requests arrive (`schedule.arrivals`), growth is not mistaken from arrivals that were
    many by chance: at 1.1 times what it can serve, a server has a tenth of that time's work left at the end, whatever
    the chance.
    """
    begun = np.sort(np.array([_begun(row) for row in rows], dtype=float)) / 1000
    ends = np.sort([row["end_ms"] / 1000 for row in rows if row.get("end_ms") is not None])
    answered = [row for row in rows if row["error"] is None and row["end_ms"] <= 1000 * seconds]
    at = np.linspace(_filled(rows, seconds), seconds, 241)[1:]
    inside = (np.searchsorted(begun, at, "right") - np.searchsorted(ends, at, "right")).astype(float)
    first, last = float(inside[:80].mean()), float(inside[-24:].mean())
    served = len(answered) / seconds
    if len(begun) < 2 * _BLOCKS:
        return Queue(None, first, last, served, growing=False)
    growth = slope(at.tolist(), inside.tolist())
    material = max(_MATERIAL_REQUESTS, first / 2, _MATERIAL_SHARE * len(begun), _CHANCE * math.sqrt(len(begun)))
    return Queue(growth, first, last, served, growing=growth.lower > 0 and last - first > material)


def _filled(rows: Sequence[Mapping[str, Any]], seconds: float) -> float:
    """When a server that began empty holds what it will hold: twice the time that the first tenth's requests took."""
    early = sorted(rows, key=_begun)[: max(5, len(rows) // 10)]
    took = sorted((row["end_ms"] - _begun(row)) / 1000 for row in early if row.get("end_ms") is not None)
    return min(seconds / 2, 2 * float(took[int(0.9 * len(took))])) if took else 0.0


def _begun(row: Mapping[str, Any]) -> float:
    """When a request was sent; one that never was counts from when it was due."""
    return float(row.get("start_ms", row["due_ms"]))
