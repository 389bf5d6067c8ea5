"""The report of one release: one self-contained page with every verdict, its reason and its evidence.

What was not measured is marked as such. The page has no script, loads nothing, and contains its pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from containers.errors import ScanError
from containers.sandbox.memory import MemorySample
from containers.scan.evidence import ScanEvidence, read_scan
from evals.drift.mixture import Mixture, read_mixture
from evals.drift.pairs import Drift, read_drift
from evals.errors import AnswersError, EvaluationError, LoadEvidenceError
from evals.load.cost import CostEvidence, read_cost
from evals.load.cost import sentences as cost_sentences
from evals.load.evidence import LoadEvidence, read_load_evidence
from evals.load.measurements import read_samples
from evals.load.requests import RequestRecord, read_requests
from evals.load.variants import Variant, read_variants
from evals.report import (
    cost_pictures,
    drift_pictures,
    html,
    load_pictures,
    load_report,
    mixture_pictures,
    pictures,
    side_by_side,
)
from evals.report.pictures import StageTime, shown_bytes
from registry.verdict import Verdict

NOT_MEASURED = "not measured"


class ReportError(EvaluationError):
    """Evidence that exists and can't be read; the message names the file."""


@dataclass(frozen=True)
class ReportEvidence:
    """The evidence that the gates read; None or empty where there is no such file."""

    drift: Drift | None = None
    scan: ScanEvidence | None = None
    load: LoadEvidence | None = None
    requests: Sequence[RequestRecord] = ()
    memory: Sequence[MemorySample] = ()
    cost: CostEvidence | None = None
    variants: Sequence[Variant] = ()
    mixture: Mixture | None = None

    @classmethod
    def read(cls, *folders: Path) -> ReportEvidence:
        """Read the evidence files, from ``drift.json`` to ``cost.json``, by their names.

        Each file may be in any of the folders: a release's ``release/evidence``, or those of the stages' artifacts.

        Raises:
            ReportError: a file exists and can't be read.
        """
        found = {path.name: path for folder in folders for path in sorted(folder.glob("*.json*"))}
        try:
            return cls(
                drift=read_drift(found["drift.json"].parent) if "drift.json" in found else None,
                scan=read_scan(found["scan.json"].parent) if "scan.json" in found else None,
                load=read_load_evidence(found["load.json"].parent) if "load.json" in found else None,
                requests=read_requests(found["requests.jsonl"].parent) if "requests.jsonl" in found else (),
                memory=read_samples(found["memory.json"].parent) if "memory.json" in found else (),
                cost=read_cost(found["cost.json"]) if "cost.json" in found else None,
                variants=read_variants(found["variants.json"].parent) if "variants.json" in found else (),
                mixture=read_mixture(found["mixture.json"]) if "mixture.json" in found else None,
            )
        except (AnswersError, LoadEvidenceError, ScanError) as error:
            raise ReportError(f"the report can't be written: {error}") from error


@dataclass(frozen=True)
class ReportedRelease:
    """The release that a report describes. ``facts``, ``waived`` and ``digests`` are shown as given: label → value."""

    model: str
    scheme: str
    created: str
    source_bytes: int | None = None
    released_bytes: int | None = None
    stages: Sequence[StageTime] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    waived: Mapping[str, str] = field(default_factory=dict)


def write(path: Path, subject: ReportedRelease, verdicts: Sequence[Verdict], evidence: ReportEvidence) -> None:
    """Write the report of a release; the same evidence gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(subject, verdicts, evidence), encoding="utf-8")


def render(subject: ReportedRelease, verdicts: Sequence[Verdict], evidence: ReportEvidence) -> str:
    """Return the report of a release as one HTML page."""
    by_gate = {verdict.gate: verdict for verdict in verdicts}
    return html.render(
        "report.html.j2",
        subject=subject,
        verdicts=[_row(verdict) for verdict in verdicts],
        headline=_headline(verdicts),
        tone=_tone(verdicts),
        tiles=_tiles(subject, verdicts),
        tables={
            "Serving variants": side_by_side.variants(verdicts, evidence.load, evidence.variants),
            "LoRA adapters": side_by_side.adapters(subject.model, by_gate.get("drift"), evidence.drift, evidence.load),
        },
        load=load_report.section(evidence.load, by_gate["load"]) if evidence.load and "load" in by_gate else None,
        figures=_figures(subject, verdicts, evidence),
        costs=evidence.cost.rows if evidence.cost else [],
        cost_notes=cost_sentences(evidence.cost) if evidence.cost else [],
        flips=drift_pictures.examples(evidence.drift) if evidence.drift else [],
    )


@dataclass(frozen=True)
class _Figure:
    """A picture under its heading, or why it is missing."""

    heading: str
    svg: Markup | None
    missing: str


def _figures(subject: ReportedRelease, verdicts: Sequence[Verdict], evidence: ReportEvidence) -> list[_Figure]:
    by_gate = {verdict.gate: verdict for verdict in verdicts}
    drift, scheme = evidence.drift, subject.scheme
    limits = by_gate["load"].limits if "load" in by_gate else {}
    limit = evidence.load.memory.limit_bytes if evidence.load else None
    sizes = (subject.source_bytes, subject.released_bytes)
    no_drift, no_load = "the drift stage left no answers", "no request was answered"
    drawn = [
        (
            "Loss, against its limit",
            pictures.losses(by_gate["drift"]) if "drift" in by_gate else None,
            no_drift,
        ),
        ("Accuracy and flips", pictures.accuracy(drift, scheme) if drift else None, no_drift),
        ("Bits per byte", pictures.bits(drift, scheme) if drift else None, no_drift),
        ("Divergence from FP16", _divergence(drift, by_gate.get("drift")), "distributions were not compared"),
        ("Layer by layer", drift_pictures.layers(drift.layers) if drift else None, "no layer was compared with FP16's"),
        ("Latency", pictures.latency(evidence.requests, limits), no_load),
        (
            "Memory",
            pictures.memory(evidence.memory, limit, limits.get("peak_memory_bytes")) if limit else None,
            "the container's memory was not sampled",
        ),
        ("Vulnerabilities", pictures.vulnerabilities(evidence.scan) if evidence.scan else None, _blind(evidence.scan)),
        (
            "Size",
            pictures.sizes(sizes[0], sizes[1], scheme) if sizes[0] is not None and sizes[1] is not None else None,
            "sizes were not given",
        ),
        *_costs(evidence.cost),
        ("Time by stage", pictures.stages(subject.stages), "no stage was timed"),
    ]
    if evidence.mixture:
        drawn.insert(5, ("Format of each layer", mixture_pictures.mixture(evidence.mixture), ""))
    if evidence.load and (found := evidence.load.capacity):
        drawn.insert(5, ("Capacity", load_pictures.capacity(found), "fewer than two rates were answered"))
    return [
        _Figure(heading, None if svg is None else Markup(svg), missing)  # noqa: S704 - our canvas escapes its text
        for heading, svg, missing in drawn
    ]


def _costs(found: CostEvidence | None) -> list[tuple[str, str | None, str]]:
    if found is None:
        return []  # the model's file has no prices, which is not a missing measurement
    drawn = [("Dollars for a million output tokens", cost_pictures.per_million(found), "there are no prices")]
    if found.day:
        drawn.append(("A day, by the hour", cost_pictures.day(found), "the model's file has no `requests_per_day`"))
    return drawn


def _divergence(drift: Drift | None, verdict: Verdict | None) -> str | None:
    if drift is None or drift.divergence is None:
        return None
    return drift_pictures.divergence(drift.divergence, verdict.limits.get("divergence.max_mean") if verdict else None)


def _blind(scan: ScanEvidence | None) -> str:
    if scan is None:
        return "the image was not scanned"
    return f"the vulnerability database was {scan.database.state}, so vulnerabilities were not searched for"


@dataclass(frozen=True)
class _VerdictRow:
    """A gate as the table shows it; ``details`` are names with measurement and limit."""

    gate: str
    status: str
    tone: str
    reason: str
    accepted_because: str | None
    details: Sequence[tuple[str, str, str]]


def _row(verdict: Verdict) -> _VerdictRow:
    """A gate as the table shows it: the metrics, each with its limit, then the limits that were not measured."""
    bounded = {name: _bounded_by(name, verdict.limits) for name in verdict.metrics}
    details = [
        (name, _number(name, value), "" if limit is None else _number(name, verdict.limits[limit]))
        for name, value in verdict.metrics.items()
        for limit in [bounded[name]]
    ]
    details += [
        (name, NOT_MEASURED, _number(name, value))
        for name, value in verdict.limits.items()
        if name not in bounded.values() and not name.endswith("confidence")
    ]
    accepted = verdict.status == "inconclusive" and not verdict.blocks
    return _VerdictRow(
        gate=verdict.gate,
        status="accepted" if accepted else verdict.status,
        tone="bad" if verdict.blocks else "warn" if accepted else "good",
        reason=verdict.reason,
        accepted_because=verdict.accepted_because if accepted else None,
        details=sorted(details),
    )


def _bounded_by(metric: str, limits: Mapping[str, float]) -> str | None:
    """Return the limit of a metric: the one of its name, or for a drift metric's upper bound ``max_…`` of its task."""
    if metric in limits:
        return metric
    task, _, kind = metric.rpartition(".")
    limit = {
        "drop_upper": f"{task}.max_drop",
        "increase_upper": f"{task}.max_increase",
        "mean_upper": f"{task}.max_mean",
    }.get(kind)
    return limit if limit in limits else None


def _tone(verdicts: Sequence[Verdict]) -> str:
    if not verdicts or any(verdict.blocks for verdict in verdicts):
        return "bad"
    return "good" if all(verdict.status == "pass" for verdict in verdicts) else "warn"


def _headline(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return "Not judged: there is no verdict of any gate"
    blocking = [verdict.gate for verdict in verdicts if verdict.blocks]
    if blocking:
        return f"Refused by {' and '.join(blocking)}"
    inconclusive = [verdict.gate for verdict in verdicts if verdict.status != "pass"]
    if inconclusive:
        return f"Accepted: {' and '.join(inconclusive)} inconclusive, accepted in the model's file"
    return "Every gate passed"


def _tiles(subject: ReportedRelease, verdicts: Sequence[Verdict]) -> list[tuple[str, str]]:
    """The most important figures."""
    metrics = {name: value for verdict in verdicts for name, value in verdict.metrics.items()}
    drops = [value for name, value in metrics.items() if name.endswith(".drop")]
    increases = [value for name, value in metrics.items() if name.endswith(".increase")]
    sizes = (subject.source_bytes, subject.released_bytes)
    p95, speed, peak = (
        metrics.get(name) for name in ("p95_latency_ms", "output_tokens_per_second", "peak_memory_bytes")
    )
    shown = {
        "accuracy": f"{-100 * max(drops):+.2f} points" if drops else None,
        "bits per byte": f"{100 * max(increases):+.2f} %" if increases else None,
        "size": f"{sizes[1] / sizes[0]:.0%} of FP16" if sizes[0] and sizes[1] else None,
        "p95 latency": f"{p95:,.0f} ms" if p95 is not None else None,
        "tokens a second": f"{speed:,.1f}" if speed is not None else None,
        "peak memory": f"{peak / 2**30:.2f} GiB" if peak is not None else None,
    }
    return [(label, value or NOT_MEASURED) for label, value in shown.items()]


def _number(name: str, value: float) -> str:
    """Write a metric with its unit, which its name states."""
    if name.endswith("_bytes"):
        return shown_bytes(value)
    if name.endswith("_ms"):
        return f"{value:,.1f} ms"
    return f"{int(value):,}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.5g}"
