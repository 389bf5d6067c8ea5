"""The load test's pages: every limit with its verdict, the faults' table, the comparison and its pictures."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import release_evidence

from evals.load.comparison import Contender, incomparable, table
from evals.report import load_pictures
from evals.report.load_report import section, write_comparison, write_page
from registry.verdict import Verdict

STEPS = [
    {
        "rate": rate, "seconds": 10.0, "requests": int(10 * rate), "status": status, "clear": True, "reason": "",
        "client_late_ms": 1.0, "queue": {},
        "metrics": {"p95_latency_ms": p95, "requests_per_second": served},
    }
    for rate, status, p95, served in (
        (4.0, "holds", 60.0, 4.0), (8.0, "holds", 90.0, 8.0), (16.0, "saturated", 4000.0, 9.0),
        (11.0, "misses", 700.0, 9.5),
    )
]  # fmt: skip
CAPACITY = {
    "steps": STEPS, "limits": {"p95_latency_ms": 500.0}, "requests_per_second": 8.0, "interval": [8.0, 11.0],
    "knee": 8.0, "collapse": None, "output_tokens_per_second": 250.0,
    "reason": "8 requests/s (surely 8, surely not 11)",
}  # fmt: skip
FAULTS = [
    {"name": "malformed JSON", "must": "HTTP 400", "seen": "HTTP 400", "ok": True, "seconds": None},
    {
        "name": "slow reader",
        "must": "others are answered",
        "seen": "they are <not>",
        "ok": False,
        "seconds": 30.5,
        "limit_seconds": 30.0,
    },
    {
        "name": "memory limit hit",
        "must": "it lives",
        "seen": "not inflicted: no memory",
        "ok": None,
        "seconds": None,
        "limit_seconds": None,
    },
]
VERDICT = Verdict(
    gate="load", status="fail", reason="p95_latency_ms 50.0 ms > 40.0 ms",
    metrics={"p95_latency_ms": 50.0, "requests_per_second": 4.0},
    limits={"p95_latency_ms": 40.0, "requests_per_second": 3.0, "p95_ttft_ms": 9.0},
)  # fmt: skip


def evidence(factor: float = 1.0, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    load: dict[str, Any] = copy.deepcopy({**release_evidence.LOAD, "capacity": CAPACITY, **changes})
    load["capacity"]["requests_per_second"] *= factor
    load["capacity"]["output_tokens_per_second"] *= factor
    return load


def test_each_limit_has_its_measurement_and_its_own_verdict() -> None:
    rows = {row["name"]: row for row in section(evidence(), VERDICT)["limits"]}
    assert [rows["p95_latency_ms"][key] for key in ("measured", "limit", "verdict")] == ["50.0 ms", "40.0 ms", "fail"]
    assert rows["requests_per_second"]["verdict"] == "pass"
    assert (rows["p95_ttft_ms"]["measured"], rows["p95_ttft_ms"]["verdict"]) == ("not measured", "fail")


def test_the_clients_own_cost_is_stated() -> None:
    facts = section(evidence(), VERDICT)["facts"]
    assert facts["the load generator's own cost"].startswith("0.20 cores")


def test_a_page_shows_faults_findings_and_the_curve_and_runs_nothing(tmp_path: Path) -> None:
    load = evidence(faults=FAULTS, findings=["memory was `far` off"])
    write_page(tmp_path / "load.html", "demo-awq", VERDICT, load, (), release_evidence.SAMPLES)
    html = (tmp_path / "load.html").read_text()
    for words in (
        "did not hold",
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
    rows = table([Contender("fp16", 100, evidence()), Contender("awq", 40, evidence(2.0))], 3.6)
    # 3.6 an hour is 0.001 a second; 250 tokens of it.
    assert rows[0]["cost_per_million_tokens"] == pytest.approx(4.0)
    assert rows[1]["cost_per_million_tokens"] == pytest.approx(2.0)
    assert table([Contender("fp16", 100, evidence())], None)[0]["cost_per_million_tokens"] is None


def test_what_was_not_measured_is_said_and_not_drawn_as_zero(tmp_path: Path) -> None:
    bare = {**evidence(), "capacity": None}
    rows = write_comparison(
        tmp_path / "c.html", "demo", [Contender("fp16", 9, evidence()), Contender("awq", 4, bare)], {}, 2
    )
    assert rows[1]["cost_per_million_tokens"] is None
    assert (tmp_path / "c.html").read_text().count("not measured") >= 4


def test_a_comparison_says_what_is_better_and_by_how_much(tmp_path: Path) -> None:
    contenders = [Contender("fp16", 1000, evidence()), Contender("awq", 400, evidence(1.5))]
    write_comparison(tmp_path / "c.html", "demo", contenders, {"awq": VERDICT}, 2.0)
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
    other = evidence()
    other["profiles"][0]["requested"]["rate"] = 9.0
    other["server"]["version"] = "0.33.0"
    told = incomparable([Contender("fp16", 9, evidence()), Contender("awq", 9, other)])
    assert told == ["the traffic differs", "the engine's version differs"]
    assert incomparable([Contender("fp16", 9, evidence()), Contender("awq", 4, evidence(2.0))]) == []


def test_the_peak_of_the_picture_is_the_one_that_is_judged(tmp_path: Path) -> None:
    samples = [
        {"seconds": 0.0, "phase": "load", "memory_bytes": 2 << 30},
        {"seconds": 1.0, "phase": "faults", "memory_bytes": 3 << 30},
    ]
    write_page(tmp_path / "load.html", "demo-awq", VERDICT, evidence(), (), samples)
    assert "peak 2.00 GiB" in (tmp_path / "load.html").read_text()


def test_a_curve_needs_two_rates() -> None:
    assert load_pictures.capacity({**CAPACITY, "steps": STEPS[:1]}) is None
    assert load_pictures.comparison([{"name": "fp16", "size_bytes": 1}]) is None
