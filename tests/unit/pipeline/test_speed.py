"""A champion's load test beside its release's: what counts as slower, and when the two can be compared at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from load_evidence import changed

from evals.load.evidence import LoadEvidence
from pipeline.operations.load_tests import LoadTestResult
from pipeline.operations.speed import Speed, slower
from registry.verdict import Verdict
from unit.pipeline.release_evidence import LOAD


def measured(**shares: float) -> LoadEvidence:
    """The release's load test, with so many times its metrics."""
    return changed(LOAD, {"metrics": {name: share * LOAD.metrics[name] for name, share in shares.items()}})


def computed_on(**changes: object) -> LoadEvidence:
    return changed(LOAD, {"server": {"computed_on": changes}})


def speed_of(shares: dict[str, float], status: Any = "pass") -> Speed:  # noqa: ANN401
    verdict = Verdict(gate="load", status=status, reason="p95 latency is 50 ms")
    return Speed("3", LoadTestResult("demo-awq", verdict, LOAD, Path(), Path()), shares, allowed=0.25)


def test_slower_is_a_fraction_of_what_it_was_whichever_way_is_worse() -> None:
    now = measured(p95_latency_ms=1.5, p95_ttft_ms=0.5, output_tokens_per_second=0.5)
    assert slower(LOAD, now) == pytest.approx(
        {"p95_latency_ms": 0.5, "p95_ttft_ms": -0.5, "output_tokens_per_second": 1.0}
    )


def test_other_traffic_is_not_compared() -> None:
    (profile,) = LOAD.profiles
    faster = profile.model_copy(update={"requested": profile.requested.model_copy(update={"rate": 8.0})})
    assert slower(LOAD, LOAD.model_copy(update={"profiles": (faster,)})) == {}
    assert speed_of({}).words == "version 3: pass, p95 latency is 50 ms; not comparable"


@pytest.mark.parametrize(
    "other", [{"cpu_model": "Another"}, {"instruction_set": "avx512"}, {"cores": [0, 1, 2]}, {"cores_shared": True}]
)
def test_latencies_of_other_hardware_are_not_compared(other: dict[str, Any]) -> None:
    assert slower(LOAD, computed_on(**other)) == {}


def test_which_cores_of_the_same_cpu_does_not_matter_nor_what_old_evidence_does_not_tell() -> None:
    assert slower(LOAD, computed_on(cores=[6])) != {}
    assert slower(LOAD, changed(LOAD, {"server": {"computed_on": None}})) != {}


def test_a_champion_holds_while_limits_hold_and_nothing_is_slower_than_allowed() -> None:
    assert speed_of({"p95_latency_ms": 0.25}).holds
    assert not speed_of({"p95_latency_ms": 0.26}).holds
    assert not speed_of({}, "fail").holds
    assert "p95_latency_ms +26% (25% allowed)" in speed_of({"p95_latency_ms": 0.26}).words
