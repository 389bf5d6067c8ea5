"""The load test in HTML: every limit with its measurement and verdict, faults, findings; and pages of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from containers.sandbox.memory import MemorySample
from evals.load.comparison import MEASURES, ComparedScheme, ComparisonRow, incomparable, table
from evals.load.evidence import FaultResult, LoadEvidence
from evals.load.requests import RequestRecord
from evals.load.slo import met, shown
from evals.report import html, load_pictures, pictures
from evals.report.pictures import shown_bytes
from registry.verdict import Verdict

_UNMEASURED = "not measured"
_TONES = {"pass": "good", "fail": "bad", "inconclusive": "warn"}


@dataclass(frozen=True)
class LimitRow:
    """One limit as a page shows it: what was measured, what is allowed, and the verdict on it alone."""

    name: str
    measured: str
    limit: str
    verdict: str
    tone: str


@dataclass(frozen=True)
class FaultRow:
    """One fault as a page shows it; ``recovery`` is how long it took, of how long it may take."""

    name: str
    must: str
    seen: str
    recovery: str
    verdict: str
    tone: str


@dataclass(frozen=True)
class LoadSection:
    """What `load.html.j2` shows; ``faults`` is None if none was asked for, ``facts`` are label → value."""

    limits: Sequence[LimitRow]
    faults: Sequence[FaultRow] | None
    findings: Sequence[str]
    facts: Mapping[str, str]


def section(load: LoadEvidence, verdict: Verdict) -> LoadSection:
    """The load test's part of a page."""
    return LoadSection(
        limits=[limit_row(name, verdict) for name in verdict.limits],
        faults=None if load.faults is None else [fault_row(fault) for fault in load.faults],
        findings=load.findings,
        facts=_facts(load),
    )


def limit_row(name: str, verdict: Verdict) -> LimitRow:
    """One limit of a verdict."""
    measured = verdict.metrics.get(name)
    good = met(name, verdict.metrics, verdict.limits)
    return LimitRow(
        name=name,
        measured=_UNMEASURED if measured is None else shown(name, measured),
        limit=shown(name, verdict.limits[name]),
        verdict="pass" if good else "fail",
        tone="good" if good else "bad",
    )


def fault_row(fault: FaultResult) -> FaultRow:
    """One fault of a load test."""
    taken, limit = fault.seconds, fault.limit_seconds
    recovery = "" if taken is None else f"{taken:.1f} s" + ("" if limit is None else f" of {limit:g} s")
    verdict, tone = {
        None: ("not inflicted", "warn"), True: ("survived", "good"), False: ("not survived", "bad"),
    }[fault.ok]  # fmt: skip
    return FaultRow(fault.name, fault.must, fault.seen, recovery, verdict, tone)


def _facts(load: LoadEvidence) -> dict[str, str]:
    facts = {}
    for each in load.profiles:
        late = each.traffic.client_late_ms.get("p95")
        sent = f"{each.traffic.requests} requests at {each.requested.rate:g}/s for {each.requested.seconds:g} s"
        facts[f"traffic, {each.name}"] = sent + ("" if late is None else f"; the client was {late:.0f} ms late at p95")
        hits = each.metrics.get("prefix_cache_hit_rate")
        if hits is not None:
            facts[f"prefix cache, {each.name}"] = f"{hits:.0%} of prompt tokens were cached"
        used = each.metrics.get("kv_cache_used_peak")
        if used is not None:
            waste = each.metrics.get("kv_cache_waste")
            wasted = "" if waste is None else f", {waste:.0%} of that in half-filled blocks"
            facts[f"KV cache, {each.name}"] = f"{used:.1%} used at the peak{wasted}"
    if load.capacity is not None:
        facts["capacity"] = load.capacity.reason
    memory, client = load.memory, load.client
    if memory.expected is not None:
        facts["memory, predicted"] = memory.expected.sentence
    if memory.hertz:
        phases = ", ".join(f"{phase} {shown_bytes(peak)}" for phase, peak in memory.phases.items())
        facts["memory, peaks"] = f"{phases}; {memory.hertz:.0f} samples a second from {memory.source}"
    ranks = [
        f"{name.removeprefix('worker_').removesuffix('_bytes')} {shown_bytes(peak)}"
        for name, peak in memory.peak.items()
        if name.startswith("worker_") and peak is not None
    ]
    if ranks:
        facts["memory, ranks"] = ", ".join(ranks)
    if memory.gpus:
        facts["memory, GPUs"] = ", ".join(
            f"{gpu.uuid} {'not sampled' if gpu.peak_bytes is None else shown_bytes(gpu.peak_bytes)} of "
            f"{shown_bytes(gpu.total_bytes)}"
            for gpu in memory.gpus
        )
    if client.cores is not None:
        facts["load generator"] = (
            f"{client.cores:.2f} cores while requests were under way, {client.cpu_seconds:.1f} s of processor time"
        )
    if load.server.report is not None:
        facts["engine"] = str(load.server.report)
    if load.speculation is not None:
        facts["speculation"] = str(load.speculation)
    if load.server.network:
        facts["network"] = load.server.network
    return facts


def write_page(
    path: Path,
    name: str,
    verdict: Verdict,
    load: LoadEvidence,
    requests: Sequence[RequestRecord],
    samples: Sequence[MemorySample],
) -> None:
    """Write the page of one load test."""
    limits = verdict.limits
    drawn = [
        ("Latency", pictures.latency(requests, limits)),
        ("Memory", pictures.memory(samples, load.memory.limit_bytes, limits.get("peak_memory_bytes"))),
        ("Capacity", load_pictures.capacity(load.capacity) if load.capacity else None),
    ]
    _write(
        path,
        title=name,
        subtitle="under load",
        headline=f"{verdict.status}: {verdict.reason}",
        tone=_TONES[verdict.status],
        load=section(load, verdict),
        figures=_figures(drawn),
    )


def _figures(drawn: Sequence[tuple[str, str | None]]) -> list[tuple[str, Markup]]:
    """Headings with their pictures; those without data are left out."""
    return [(heading, Markup(svg)) for heading, svg in drawn if svg]  # noqa: S704 - our canvas escapes its text


def write_comparison(
    path: Path,
    model: str,
    schemes: Sequence[ComparedScheme],
    verdicts: Mapping[str, Verdict],
    price_per_hour: float | None,
) -> list[ComparisonRow]:
    """Write the page that shows FP16 and every scheme side by side, each with its verdict; return its table."""
    rows = table(schemes, price_per_hour)
    notes = [f"{name}, {verdict.status}: {verdict.reason}" for name, verdict in verdicts.items()]
    notes += [f"Not comparable: {why}." for why in incomparable(schemes)]
    if price_per_hour is not None:
        notes.append(f"Cost of output tokens on a machine at {price_per_hour:g} an hour, kept at its capacity.")
    picture = load_pictures.comparison(rows)
    seen = {verdict.status for verdict in verdicts.values()}
    searched = [(f"Capacity, {each.name}", each.load.capacity) for each in schemes if each.load.capacity]
    _write(
        path,
        title=model,
        subtitle="FP16 and its quantized schemes",
        headline=_headline(rows),
        tone=next((_TONES[status] for status in ("fail", "inconclusive") if status in seen), "good"),
        picture=Markup(picture) if picture else None,  # noqa: S704 - our canvas escapes its text
        columns=[row.name for row in rows],
        rows=lines(rows),
        notes=notes,
        figures=_figures([(heading, load_pictures.capacity(found)) for heading, found in searched]),
    )
    return rows


def _headline(rows: Sequence[ComparisonRow]) -> str:
    """The gain of each scheme over FP16 in one sentence."""
    base, *others = rows
    words = []
    for row in others:
        parts = [f"{row.size_bytes / base.size_bytes:.0%} of the size"]
        for name, measure in (
            ("capacity_requests_per_second", "capacity"),
            ("output_tokens_per_second", "tokens a second"),
        ):
            mine, baseline = row.measure(name), base.measure(name)
            if mine and baseline:
                parts.append(f"{mine / baseline:.2f} times the {measure}")
                break
        words.append(f"{row.name}: {', '.join(parts)}")
    return "; ".join(words)


def lines(rows: Sequence[ComparisonRow]) -> list[tuple[str, list[str]]]:
    """The lines of a comparison's table: one for each measure that any row has, one cell for each row."""
    return [
        (label(name), [cell(name, row.measure(name)) for row in rows])
        for name in MEASURES
        if any(row.measure(name) is not None for row in rows)
    ]


def label(name: str) -> str:
    """A measure's name for a person; its unit is beside the value."""
    return name.removesuffix("_ms").removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")


def cell(name: str, value: float | None) -> str:
    """A measure as the comparison's table shows it."""
    if value is None:
        return _UNMEASURED
    return shown_bytes(value) if name == "size_bytes" else f"{value:.4g}" if "cost" in name else shown(name, value)


def _write(path: Path, **values: Any) -> None:  # noqa: ANN401 - the template's
    blank: dict[str, Any] = {"picture": None, "columns": [], "rows": [], "notes": [], "load": None, "figures": []}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html.render("load_page.html.j2", **{**blank, **values}), encoding="utf-8")
