"""The load test's pages: every limit with its verdict, the faults' table, the comparison and its pictures."""

from __future__ import annotations

from pathlib import Path

import load_evidence
import pytest

from containers.sandbox.memory import MemorySample
from evals.load.comparison import ComparedScheme, ComparisonRow, incomparable, table
from evals.load.evidence import FaultResult, LoadEvidence
from evals.report import load_pictures
from evals.report.load_report import section, write_comparison, write_page
from registry.verdict import Verdict
from unit.pipeline import release_evidence

STEPS = [
    load_evidence.step(4, p95_latency_ms=60),
    load_evidence.step(8, p95_latency_ms=90),
    load_evidence.step(16, "saturated", p95_latency_ms=4000),
    load_evidence.step(11, "misses", p95_latency_ms=700),
]
CAPACITY = load_evidence.searched(8.0, 11.0, STEPS)
FAULTS = (
    FaultResult(name="malformed JSON", must="HTTP 400", seen="HTTP 400", ok=True),
    FaultResult(
        name="slow reader", must="others are answered", seen="they are <not>", ok=False, seconds=30.5, limit_seconds=30
    ),
    FaultResult(name="memory limit hit", must="it survives", seen="not inflicted: no memory", ok=None),
)
VERDICT = Verdict(
    gate="load", status="fail", reason="p95_latency_ms 50.0 ms > 40.0 ms",
    metrics={"p95_latency_ms": 50.0, "requests_per_second": 4.0},
    limits={"p95_latency_ms": 40.0, "requests_per_second": 3.0, "p95_ttft_ms": 9.0},
)  # fmt: skip


def evidence(factor: float = 1.0, **changes: object) -> LoadEvidence:
    """A real load test with a search for the capacity, which found ``factor`` times as much."""
    capacity = CAPACITY.model_copy(
        update={"requests_per_second": 8.0 * factor, "output_tokens_per_second": 256.0 * factor}
    )
    return load_evidence.measured().model_copy(update={"capacity": capacity, **changes})


def test_each_limit_has_its_measurement_and_its_own_verdict() -> None:
    rows = {row.name: row for row in section(evidence(), VERDICT).limits}
    latency = rows["p95_latency_ms"]
    assert (latency.measured, latency.limit, latency.verdict) == ("50.0 ms", "40.0 ms", "fail")
    assert rows["requests_per_second"].verdict == "pass"
    assert (rows["p95_ttft_ms"].measured, rows["p95_ttft_ms"].verdict) == ("not measured", "fail")


def test_the_clients_own_cost_is_stated() -> None:
    load = load_evidence.changed(evidence(), {"client": {"cores": 0.2}})
    assert section(load, VERDICT).facts["load generator"].startswith("0.20 cores")


def test_the_memory_of_each_rank_and_gpu_is_stated() -> None:
    gpus = [{"uuid": "GPU-1", "total_bytes": 80e9, "peak_bytes": 73e9},
            {"uuid": "GPU-2", "total_bytes": 80e9, "peak_bytes": None}]  # fmt: skip
    ranks = {"worker_tp0_bytes": 1_670_000_000, "worker_tp1_bytes": 1_680_000_000}
    facts = section(load_evidence.changed(evidence(), {"memory": {"gpus": gpus, "peak": ranks}}), VERDICT).facts
    assert facts["memory, ranks"] == "tp0 1.67 GB, tp1 1.68 GB"
    assert facts["memory, GPUs"] == "GPU-1 73.0 GB of 80.0 GB, GPU-2 not sampled of 80.0 GB"


def test_a_page_shows_faults_findings_and_the_curve_and_runs_nothing(tmp_path: Path) -> None:
    load = evidence(faults=FAULTS, findings=("memory was `far` off",))
    write_page(tmp_path / "load.html", "demo-awq", VERDICT, load, (), [release_evidence.SAMPLE])
    html = (tmp_path / "load.html").read_text()
    for words in (
        ">not survived<",
        "they are &lt;not&gt;",
        "<code>far</code>",
        "p95 limit 500 ms",
        "capacity",
        "knee",
        "30.5 s of 30 s",
        ">not inflicted<",
    ):
        assert words in html, words
    assert "<script" not in html
    assert "http://www.w3.org/2000/svg" in html


def test_cost_is_price_over_tokens() -> None:
    rows = table([ComparedScheme("fp16", 100, evidence()), ComparedScheme("awq", 40, evidence(2.0))], 3.6)
    # 3.6 an hour is 0.001 a second; eight requests of 32 tokens are answered in it.
    assert rows[0].cost_per_million_tokens == pytest.approx(0.001 / 256 * 1e6)
    assert rows[1].cost_per_million_tokens == pytest.approx(0.001 / 512 * 1e6)
    assert table([ComparedScheme("fp16", 100, evidence())], None)[0].cost_per_million_tokens is None


def test_what_was_not_measured_is_said_and_not_drawn_as_zero(tmp_path: Path) -> None:
    bare = evidence(capacity=None)
    rows = write_comparison(
        tmp_path / "c.html", "demo", [ComparedScheme("fp16", 9, evidence()), ComparedScheme("awq", 4, bare)], {}, 2
    )
    assert rows[1].cost_per_million_tokens is None
    assert (tmp_path / "c.html").read_text().count("not measured") >= 4


def test_a_comparison_says_what_is_better_and_by_how_much(tmp_path: Path) -> None:
    schemes = [ComparedScheme("fp16", 1000, evidence()), ComparedScheme("awq", 400, evidence(1.5))]
    write_comparison(tmp_path / "c.html", "demo", schemes, {"awq": VERDICT}, 2.0)
    html = (tmp_path / "c.html").read_text()
    for words in (
        "awq: 40% of the size, 1.50 times the capacity",
        "2.50 x",
        "1.50 x",
        "less is better",
        "the same",
        "awq, fail: p95_latency_ms 50.0 ms",
    ):
        assert words in html, words


def test_other_traffic_is_no_comparison() -> None:
    (profile,) = load_evidence.measured().profiles
    faster = profile.model_copy(update={"requested": profile.requested.model_copy(update={"rate": 9.0})})
    other = load_evidence.changed(evidence(profiles=(faster,)), {"server": {"version": "0.33.0"}})
    found = incomparable([ComparedScheme("fp16", 9, evidence()), ComparedScheme("awq", 9, other)])
    assert found == ["the traffic differs", "the engine's version differs"]
    assert incomparable([ComparedScheme("fp16", 9, evidence()), ComparedScheme("awq", 4, evidence(2.0))]) == []


def test_the_peak_of_the_picture_is_the_one_that_is_judged(tmp_path: Path) -> None:
    samples = [
        MemorySample(seconds=0.0, phase="load", memory_bytes=2 << 30),
        MemorySample(seconds=1.0, phase="faults", memory_bytes=3 << 30),
    ]
    write_page(tmp_path / "load.html", "demo-awq", VERDICT, evidence(), (), samples)
    assert "peak 2.00 GiB" in (tmp_path / "load.html").read_text()


def test_a_curve_needs_two_rates() -> None:
    assert load_pictures.capacity(CAPACITY.model_copy(update={"steps": tuple(STEPS[:1])})) is None
    assert load_pictures.comparison([ComparisonRow(name="fp16", size_bytes=1)]) is None
