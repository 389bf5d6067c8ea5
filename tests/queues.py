"""Queues whose behaviour is known: what a server with a fixed number of workers does to arrivals."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from evals.load.requests import RequestRecord


def served(due_ms: Sequence[float], service_ms: Sequence[float], workers: int) -> list[float]:
    """When each request is done, first come first served (Kiefer and Wolfowitz's recursion)."""
    free = [0.0] * workers
    ends = []
    for due, service in zip(due_ms, service_ms, strict=True):
        end = max(due, heapq.heappop(free)) + service
        heapq.heappush(free, end)
        ends.append(end)
    return ends


def rows(due_ms: Sequence[float], service_ms: Sequence[float], workers: int) -> list[RequestRecord]:
    """The records that a perfect client would write of such a server."""
    return [
        RequestRecord(
            number=number, due_ms=due, start_ms=due, late_ms=0.0, end_ms=end, latency_ms=end - due, ttft_ms=end - due,
            tpot_ms=1.0, input_tokens=8, output_tokens=8, error=None,
        )
        for number, (due, end) in enumerate(zip(due_ms, served(due_ms, service_ms, workers), strict=True))
    ]  # fmt: skip
