"""Whether a server's queue grows, which is the mark of saturation, or is merely long."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from evals.load.requests import RequestRecord
from evals.statistics.trend import slope

# Fewer requests than this are too few for the slope of a queue.
_FEWEST_REQUESTS = 24
# A queue that grew by less than this share of all requests is a busy server's, not a saturated one's.
_MATERIAL_SHARE = 0.03
_MATERIAL_REQUESTS = 3.0
_CHANCE = 0.6


class Queue(BaseModel):
    """The requests in a server over the time in which they arrived.

    ``growth_per_second`` is in requests a second, as estimate, lower and upper end; None where there were too few.
    ``in_server_first`` and ``in_server_last`` are the mean numbers in the server in the first third and in the last
    tenth of the time; ``served_per_second`` is what it answered without an error in that time.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    growth_per_second: tuple[float, float, float] | None = None
    """Growth of the number of requests in the server, per second: estimate, lower and upper bound."""
    in_server_first: float
    """Mean number of requests in the server in the first third of the time."""
    in_server_last: float
    """Mean number of requests in the server in the last tenth of the time."""
    served_per_second: float
    """Requests per second answered without an error."""
    growing: bool
    """Whether the queue grew."""


def queue(requests: Sequence[RequestRecord], seconds: float) -> Queue:
    """Measure the queue over the ``seconds`` in which requests arrived, and say whether it grew.

    A request is in the server from when it was sent, so that a client that sends late is not taken for a server's
    queue. It grew where three conditions hold: the slope of the number in the server is positive with certainty; the
    last tenth of the time holds half as many again as the first third; and the growth is more than 3% of the requests
    and more than chance makes of a busy server's queue, which goes with the root of their number. The time in which an
    empty server fills is left out. As exactly rate times time requests arrive (`schedule.arrivals`), a large number of
    arrivals by chance is not mistaken for growth: at 1.1 times what it can serve, a server has a tenth of that time's
    work left at the end, whatever the chance.
    """
    begun = np.sort(np.array([request.sent_ms for request in requests], dtype=float)) / 1000
    ends = np.sort([request.end_ms / 1000 for request in requests if request.end_ms is not None])
    in_time = [each for each in requests if each.answered and (each.end_ms or 0.0) <= 1000 * seconds]
    at = np.linspace(_filled(requests, seconds), seconds, 241)[1:]
    inside = (np.searchsorted(begun, at, "right") - np.searchsorted(ends, at, "right")).astype(float)
    first, last = float(inside[:80].mean()), float(inside[-24:].mean())
    served = len(in_time) / seconds
    if len(begun) < _FEWEST_REQUESTS:
        return Queue(in_server_first=first, in_server_last=last, served_per_second=served, growing=False)
    growth = slope(at.tolist(), inside.tolist())
    material = max(_MATERIAL_REQUESTS, first / 2, _MATERIAL_SHARE * len(begun), _CHANCE * math.sqrt(len(begun)))
    return Queue(
        growth_per_second=(growth.estimate, growth.lower, growth.upper),
        in_server_first=first,
        in_server_last=last,
        served_per_second=served,
        growing=growth.lower > 0 and last - first > material,
    )


def _filled(requests: Sequence[RequestRecord], seconds: float) -> float:
    """When a server that began empty is full: twice the time that the first tenth of the requests took."""
    early = sorted(requests, key=lambda request: request.sent_ms)[: max(5, len(requests) // 10)]
    took = sorted((each.end_ms - each.sent_ms) / 1000 for each in early if each.end_ms is not None)
    return min(seconds / 2, 2 * float(took[int(0.9 * len(took))])) if took else 0.0
