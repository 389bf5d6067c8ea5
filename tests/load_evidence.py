"""The evidence of a load test: that of a real release of the demo, and the same with changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.load.capacity import Capacity, CapacitySearch, CapacityStep, Status
from evals.load.evidence import LoadEvidence, read_load_evidence
from evals.load.queueing import Queue
from evals.load.requests import RequestRecord, read_requests

FOLDER = Path(__file__).parent / "data" / "load_test"


def measured() -> LoadEvidence:
    """The load test of a release of the demo with AWQ: 40 requests at 4 a second."""
    return read_load_evidence(FOLDER)


def requests() -> list[RequestRecord]:
    """The requests of that load test."""
    return read_requests(FOLDER)


def changed(evidence: LoadEvidence, changes: Mapping[str, Any]) -> LoadEvidence:
    """The evidence with other values; mappings are merged, and a key that the evidence does not have is refused."""
    document = _merged(evidence.model_dump(mode="json", by_alias=True), changes)
    return LoadEvidence.model_validate(document, extra="forbid")


def _merged(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(document)
    for name, value in changes.items():
        before = found.get(name)
        found[name] = _merged(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return found


def step(rate: float, status: Status = "holds", **metrics: float) -> CapacityStep:
    """One step of a search for the capacity; by default the server answered all that was sent."""
    served = {"requests_per_second": rate, "drained_requests_per_second": rate, "output_tokens_per_second": 32 * rate}
    return CapacityStep(
        rate=rate, seconds=10, requests=round(10 * rate), status=status, clear=True, reason=status,
        metrics={**served, **metrics}, client_late_ms=1.0,
        queue=Queue(in_server_first=1, in_server_last=1, served_per_second=rate, growing=status == "saturated"),
    )  # fmt: skip


def searched(
    rate: float | None, failing: float | None, steps: Sequence[CapacityStep], *, conclusive: bool = True
) -> Capacity:
    """What a search for the capacity found."""
    return Capacity(
        settings=CapacitySearch(), limits={"p95_latency_ms": 500.0}, requests_per_second=rate,
        output_tokens_per_second=None if rate is None else 32 * rate, interval=(rate, failing), first_failing=failing,
        saturated_from=None, served_when_saturated=None, knee=rate, collapse=None, conclusive=conclusive, reason="why",
        steps=tuple(steps),
    )  # fmt: skip
