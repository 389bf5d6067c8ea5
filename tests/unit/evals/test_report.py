"""The report: every verdict with its reason, every picture or why there is none, and nothing from outside the page."""

from __future__ import annotations

import base64
import json
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import load_evidence
import pytest

from containers.sandbox.memory import MemorySample
from containers.scan.evidence import DatabaseUsed
from evals.drift.answers import AskedSuite
from evals.drift.drift_gate import judge as judge_drift
from evals.drift.limits import DriftLimits
from evals.drift.mixture import FormatCost, MixedGroup, Mixture
from evals.drift.pairs import ChoicePairs, Divergence, DocumentPair, Drift, Example, Layer, TextPairs, write_drift
from evals.drift.suite import TaskLimits
from evals.load.requests import RequestRecord, format_requests
from evals.report import mixture_pictures, pictures
from evals.report.pictures import StageTime
from evals.report.report import ReportedRelease, ReportError, ReportEvidence, render, write
from evals.report.svg import Axis, Canvas, as_markdown, ticks
from registry.verdict import Verdict
from unit.pipeline import release_evidence

chance = random.Random(2)

LIMITS = DriftLimits(
    tasks={
        "cloze": TaskLimits(data=Path("cloze.jsonl"), max_drop=0.02),
        "perplexity": TaskLimits(data=Path("text.jsonl"), max_increase=0.01),
    }
)
DRIFT = Drift(
    engine={"vllm": "0.32"},
    engine_differences=(),
    suite=AskedSuite(name="own", digest=LIMITS.digest, lm_eval="0.4.13"),
    divergence=Divergence(
        top=20, documents=tuple((chance.uniform(0.5, 0.9), 200) for _ in range(64)), mean=0.0035, p99=0.031,
        agreement=0.972, covered=0.86, buckets=({"start": 0.0, "positions": 2048.0, "mean": 0.004, "p99": 0.03,
        "agreement": 0.96}, {"start": 32.0, "positions": 9000.0, "mean": 0.003, "p99": 0.03, "agreement": 0.97}),
        curve=tuple((share / 50, 0.0001 * 1.12**share) for share in range(51)),
    ),
    layers=tuple(Layer(name=f"model.layers.{n}.{part}", error=chance.uniform(0.02, 0.12))
                 for n in range(4) for part in ("self_attn.q_proj", "mlp.down_proj")),
    tasks={
        "cloze": ChoicePairs(
            items=800, baseline_missing=0, candidate_missing=0, baseline_right=707, candidate_right=704, changed=19,
            chance=0.25, lost_ids=tuple(map(str, range(9))), gained_ids=tuple(map(str, range(6))),
            examples=(
                Example(id="types.py:6", lost=True, question="import <sys>", wanted="a", baseline="a", candidate="b"),
            ),
        ),
        "perplexity": TextPairs(
            documents=tuple(
                DocumentPair(
                    id=str(number), bytes=2000, baseline_nats=2160.0,
                    candidate_nats=2160.0 * (1 + chance.gauss(0.003, 0.002)),
                )
                for number in range(200)
            ),
            baseline_missing=0,
            candidate_missing=0,
        ),
    },
)  # fmt: skip
REQUESTS = [
    RequestRecord(number=number, due_ms=number * 500, error=None, latency_ms=latency, ttft_ms=latency / 4)
    for number, latency in enumerate(chance.lognormvariate(6, 0.4) for _ in range(60))
]
GIB = 2**30
MEMORY = [
    MemorySample(
        seconds=number / 10, phase="start" if number < 300 else "load", memory_bytes=min(number, 260) * 10_000_000
    )
    for number in range(500)
]
SCAN = release_evidence.SCAN.model_copy(
    update={
        "database": DatabaseUsed(state="ok"),
        "counts": {"CRITICAL": 0, "HIGH": 3, "MEDIUM": 41, "LOW": 120, "UNKNOWN": 2},
        "fixable": {"CRITICAL": 0, "HIGH": 1, "MEDIUM": 12, "LOW": 3, "UNKNOWN": 0},
    }
)
LOAD_LIMITS = {"p95_latency_ms": 800.0, "p95_ttft_ms": 3000.0, "error_rate": 0.0, "peak_memory_bytes": 4.8 * GIB}
LOAD = Verdict(
    gate="load",
    status="pass",
    reason="30 requests at 2/s: p95_latency_ms 640.0 ms ≤ 800.0 ms",
    metrics={
        "p95_latency_ms": 640.2, "p95_ttft_ms": 160.1, "error_rate": 0.0, "peak_memory_bytes": 2.6e9,
        "output_tokens_per_second": 41.25,
    },
    limits=LOAD_LIMITS,
)  # fmt: skip
MEASURED = load_evidence.changed(load_evidence.measured(), {"memory": {"limit_bytes": 6 * GIB}})
UNSURE = Verdict(
    gate="scan", status="inconclusive", reason="there is no vulnerability database", cause="database-absent"
)
SUBJECT = ReportedRelease(
    model="demo",
    scheme="awq",
    created="2026-11-24T01:02:03Z",
    source_bytes=8_400_000,
    released_bytes=3_100_000,
    stages=(
        StageTime("quantized", 92.1, 90.0),
        StageTime("drift", 80.0, 79.0, cached=True),
        StageTime("image", 12.0, 11.0),
    ),
    facts={"quantizer": "autoawq 0.2.9, 4 bits, group 64", "tested on": "2 cores, x86_64"},
    digests={"image": "sha256:" + "ab" * 32},
)
EVIDENCE = ReportEvidence(drift=DRIFT, scan=SCAN, load=MEASURED, requests=REQUESTS, memory=MEMORY)
VERDICTS = (
    judge_drift(DRIFT, LIMITS),
    UNSURE.accepting({"database-absent": "the demo must run where none can be had"}),
    LOAD,
)


class Page(HTMLParser):
    """Collects what a page refers to, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "action")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


MIXTURE = Mixture(
    budget_bytes=100_000,
    bytes=96_000,
    predicted=0.012,
    greedy=0.013,
    measured=0.004,
    groups={
        f"model.layers.{number}.mlp.gate_up_proj": MixedGroup(
            layers=(f"model.layers.{number}.mlp.gate_proj",),
            weights=3_000,
            chosen="w4a16-64",
            formats={"w4a16-64": FormatCost(bytes=1_600, loss=0.0002 * number), "fp8": FormatCost(bytes=3_000, loss=0)},
            measured=0.0001 * number,
        )
        for number in range(60)
    },
)


def test_a_mixture_is_drawn_and_of_a_large_network_what_loses_the_most() -> None:
    page = Page(render(SUBJECT, VERDICTS, ReportEvidence(mixture=MIXTURE)))
    assert "Format of each layer" in page.text
    for words in ("48 of 60 groups", "predicted 0.01200, greedily 0.01300, measured 0.00400", "layers.59.mlp"):
        assert words in page.text, words
    assert "layers.3.mlp" not in page.text


def test_a_whole_report_shows_every_gate_and_every_picture() -> None:
    page = Page(render(SUBJECT, VERDICTS, EVIDENCE))
    assert page.tags.count("svg") == 10
    assert "import <sys>" in page.text
    assert "not measured" not in page.text
    for verdict in VERDICTS:
        assert verdict.reason.replace("`", " ").replace("  ", " ") in page.text
    assert "Accepted: scan inconclusive, accepted in the model's file" in page.text
    assert "the demo must run where none can be had" in page.text
    for words in ("-0.38 points", "37% of FP16", "640 ms", "41.2", "2.42 GiB", "sha256:abab"):
        assert words in page.text, words


def test_a_report_needs_nothing_but_itself() -> None:
    html = render(SUBJECT, VERDICTS, EVIDENCE)
    page = Page(html)
    assert page.references == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"url\(|@import", html)
    assert "default-src 'none'" in html
    assert len(html) < 200_000


def test_the_same_evidence_gives_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a" / "report.html", SUBJECT, VERDICTS, EVIDENCE)
    write(tmp_path / "b.html", SUBJECT, VERDICTS, EVIDENCE)
    assert (tmp_path / "a" / "report.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_nothing_measured_is_said_for_every_picture_and_figure() -> None:
    page = Page(render(ReportedRelease("demo", "awq", "2026-11-24T01:02:03Z"), (), ReportEvidence()))
    assert "svg" not in page.tags
    assert page.text.count("not measured") == 6 + 1 + 10
    assert "Not judged" in page.text


def test_a_blind_scan_shows_no_zero() -> None:
    blind = ReportEvidence(scan=release_evidence.SCAN)
    page = Page(render(SUBJECT, VERDICTS, blind))
    assert "not measured: the vulnerability database was absent, so vulnerabilities were not searched for" in page.text


def test_a_refusal_is_the_headline() -> None:
    failed = Verdict(gate="load", status="fail", reason="too slow", metrics={}, limits={"p95_latency_ms": 1.0})
    page = Page(render(SUBJECT, (*VERDICTS[:2], failed), EVIDENCE))
    assert "Refused by load" in page.text
    assert "p95_latency_ms not measured 1.0 ms" in page.text
    assert "p95_latency_ms not measured 1.0 ms fail" in page.text


def test_adapters_stand_beside_the_model_in_a_table_of_their_own() -> None:
    worse = DRIFT.tasks["cloze"].model_copy(update={"candidate_right": 680, "lost_ids": tuple(map(str, range(33)))})
    drift = DRIFT.model_copy(
        update={"adapters": {"law": DRIFT, "a.b": DRIFT.model_copy(update={"tasks": {**DRIFT.tasks, "cloze": worse}})}}
    )
    slow = {name: {"p95_latency_ms": number * 100.0} for number, name in enumerate(("demo", "law", "a.b"), 1)}
    load = load_evidence.changed(MEASURED, {"models": slow})
    verdicts = (judge_drift(drift, LIMITS, ("law", "a.b")), *VERDICTS[1:])
    text = Page(render(SUBJECT, verdicts, replace(EVIDENCE, drift=drift, load=load))).text
    assert "LoRA adapters demo a.b law largest drop in accuracy 0.38 points 3.38 points 0.38 points" in text
    assert "p95 latency 100 ms 300 ms 200 ms" in text
    assert "LoRA adapters" not in Page(render(SUBJECT, VERDICTS, EVIDENCE)).text


def test_backticks_become_code_and_stray_ones_stay() -> None:
    told = [
        Verdict(gate=gate, status="pass", reason=reason) for gate, reason in (("a", "on `x<y`"), ("b", "a ` stray"))
    ]
    html = render(SUBJECT, told, EVIDENCE)
    assert "on <code>x&lt;y</code>" in html
    assert "a ` stray" in html


def test_words_from_outside_stay_words() -> None:
    evil = '<script>alert("x")</script>'
    subject = ReportedRelease(evil, evil, evil, facts={evil: evil}, digests={evil: evil}, stages=[StageTime(evil, 1.0)])
    drift = DRIFT.model_copy(update={"tasks": {evil: DRIFT.tasks["cloze"]}})
    verdict = Verdict(gate=evil, status="fail", reason=evil, metrics={evil: 1.0})
    page = Page(render(subject, [verdict], ReportEvidence(drift=drift)))
    assert "script" not in page.tags
    assert evil in page.text


def test_evidence_is_read_from_where_it_lies(tmp_path: Path) -> None:
    drift, load = tmp_path / "drift", tmp_path / "load"
    drift.mkdir()
    load.mkdir()
    write_drift(DRIFT, drift)
    (load / "requests.jsonl").write_text(format_requests(REQUESTS))
    (load / "memory.json").write_text(json.dumps([sample.model_dump(exclude_none=True) for sample in MEMORY]))
    evidence = ReportEvidence.read(drift, load, tmp_path / "absent")
    assert evidence == ReportEvidence(drift=DRIFT, requests=REQUESTS, memory=MEMORY)
    (drift / "mixture.json").write_text(MIXTURE.format())
    assert ReportEvidence.read(drift).mixture == MIXTURE
    (load / "mixture.json").write_text("{}")
    with pytest.raises(ReportError, match=r"mixture\.json"):
        ReportEvidence.read(load)
    (load / "mixture.json").unlink()
    (load / "scan.json").write_text("{")
    with pytest.raises(ReportError, match=r"scan\.json"):
        ReportEvidence.read(load)
    (drift / "drift.json").write_text("{}")
    with pytest.raises(ReportError, match=r"drift\.json"):
        ReportEvidence.read(drift)


@pytest.mark.parametrize(
    "svg",
    [
        pictures.losses(VERDICTS[0]),
        pictures.accuracy(DRIFT, "awq"),
        pictures.bits(DRIFT, "awq"),
        pictures.latency(REQUESTS, LOAD_LIMITS),
        pictures.memory(MEMORY, 6 * GIB, 4.8 * GIB),
        pictures.vulnerabilities(SCAN),
        pictures.sizes(8_400_000, 3_100_000, "awq"),
        pictures.stages(SUBJECT.stages),
        mixture_pictures.mixture(MIXTURE),
    ],
)
def test_each_picture_is_well_formed_and_stays_in_its_frame(svg: str | None) -> None:
    assert svg is not None
    root = ET.fromstring(svg)  # noqa: S314 - made here
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for shape in root.iter():
        for name, most in (("x", width), ("y", height), ("cx", width), ("cy", height)):
            assert -0.1 <= float(shape.attrib.get(name, 0)) <= most, (shape.tag, shape.attrib, shape.text)
        for point in shape.attrib.get("points", "").split():
            x, y = map(float, point.split(","))
            assert -0.1 <= x <= width
            assert -0.1 <= y <= height


def test_a_picture_for_dagster_brings_its_own_colours() -> None:
    markdown = as_markdown(str(pictures.sizes(8_400_000, 3_100_000, "awq")))
    title, _, data = markdown.removeprefix("![").removesuffix(")").partition("](data:image/svg+xml;base64,")
    assert title == "Size of the checkpoint, FP16 and awq"
    svg = base64.b64decode(data).decode()
    ET.fromstring(svg)  # noqa: S314 - made here
    used = set(re.findall(r"var\((--\w+)\)", svg))
    assert used <= set(re.findall(r"(--\w+):", svg))


@pytest.mark.parametrize(
    "svg",
    [
        pictures.losses(LOAD),
        pictures.accuracy(Drift(engine={}, engine_differences=(), tasks={}), "awq"),
        pictures.bits(Drift(engine={}, engine_differences=(), tasks={}), "awq"),
        pictures.latency([RequestRecord(number=0, due_ms=0, error="refused")], {}),
        pictures.memory([], GIB),
        pictures.sizes(0, 1, "awq"),
        pictures.stages(()),
    ],
)
def test_nothing_is_drawn_of_nothing(svg: str | None) -> None:
    assert svg is None


def test_a_peak_survives_thinning() -> None:
    samples = [
        MemorySample(seconds=number, phase="load", memory_bytes=10 * GIB if number == 777 else GIB)
        for number in range(5000)
    ]
    assert "peak 10.00 GiB, 125% of the limit" in str(pictures.memory(samples, 8 * GIB))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 7, [-2, 0, 2, 4, 6]), (5, 5, [5]), (0, 37000, [0, 10000, 20000, 30000])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_an_axis_keeps_what_is_beyond_it_at_its_edge() -> None:
    axis = Axis(0, 10, 100, 200)
    assert [axis(value) for value in (-5, 0, 5, 10, 50)] == [100, 100, 150, 200, 200]
    assert Axis(3, 3, 0, 10)(3) == 0


def test_text_in_a_picture_is_escaped() -> None:
    canvas = Canvas("<&>", 10)
    canvas.text(0, 0, "<&>")
    assert canvas.svg().count("&lt;&amp;&gt;") == 2
