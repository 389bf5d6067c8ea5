"""Tables with a column for each serving configuration, and for the model and each of its LoRA adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from evals.drift.drift_gate import ADAPTER
from evals.drift.pairs import Comparison, Drift
from evals.load.evidence import LoadEvidence
from evals.load.variants import Variant
from evals.report.pictures import shown_bytes
from registry.verdict import Verdict

MAIN = "main"
# What is compared: a label, the end of a metric's name, and how it is written. Of several tasks the worst is shown.
_SHOWN: Sequence[tuple[str, str, Callable[[float], str]]] = (
    ("largest drop in accuracy", ".drop", lambda value: f"{100 * value:.2f} points"),
    ("largest increase in bits per byte", ".increase", lambda value: f"{100 * value:.2f} %"),
    ("p95 latency", "p95_latency_ms", lambda value: f"{value:,.0f} ms"),
    ("p95 time to first token", "p95_ttft_ms", lambda value: f"{value:,.0f} ms"),
    ("output tokens a second", "output_tokens_per_second", lambda value: f"{value:,.1f}"),
    ("peak memory", "peak_memory_bytes", shown_bytes),
    ("capacity, requests a second", "capacity_requests_per_second", lambda value: f"{value:.2f}"),
)


def variants(verdicts: Sequence[Verdict], load: LoadEvidence | None, tested: Sequence[Variant]) -> list[list[str]]:
    """Return rows of a table with a column for each configuration, the names first; nothing without variants."""
    if not tested:
        return []
    main = {name: value for verdict in verdicts for name, value in verdict.metrics.items()}
    asked = load.server.requested if load is not None else None
    context, cache = (asked and asked.value(flag) for flag in ("--max-model-len", "--kv-cache-dtype"))
    rows = [
        ["", MAIN, *(variant.name for variant in tested)],
        ["listed", "yes", *("yes" if variant.passed else f"no: {_blocking(variant)}" for variant in tested)],
        ["context, tokens", context or "", *(_context(variant) for variant in tested)],
        ["KV cache", cache or "auto", *(variant.serving.kv_cache for variant in tested)],
    ]
    return rows + _figures([main, *(variant.metrics for variant in tested)])


def adapters(model: str, verdict: Verdict | None, drift: Drift | None, load: LoadEvidence | None) -> list[list[str]]:
    """Return rows of a table with a column for the model and each adapter; nothing without adapters.

    ``verdict`` is that of the drift gate.
    """
    if drift is None or not drift.adapters:
        return []
    lost = verdict.metrics if verdict is not None else {}
    served = load.models if load is not None else {}
    columns = [{**_lost(drift, lost, ""), **served.get(model, {})}]
    for name, own in sorted(drift.adapters.items()):
        columns.append({**_lost(own, lost, f"{ADAPTER}.{name}."), **served.get(name, {})})
    return [["", model, *sorted(drift.adapters)], *_figures(columns)]


def _lost(asked: Comparison, metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """What was lost in each task of the model, or of an adapter, by the drift gate's metrics."""
    names = (f"{prefix}{task}.{kind}" for task in asked.tasks for kind in ("drop", "increase"))
    return {name: metrics[name] for name in names if name in metrics}


def _figures(columns: Sequence[Mapping[str, float]]) -> list[list[str]]:
    """What was measured of any of them, a label before each row."""
    rows = [[label, *(_cell(metrics, name, write) for metrics in columns)] for label, name, write in _SHOWN]
    return [row for row in rows if any(row[1:])]


def _blocking(variant: Variant) -> str:
    return "; ".join(f"{verdict.gate} {verdict.status}" for verdict in variant.verdicts if verdict.blocks)


def _context(variant: Variant) -> str:
    return "" if variant.serving.context is None else str(variant.serving.context)


def _cell(metrics: Mapping[str, float], name: str, write: Callable[[float], str]) -> str:
    named = [metric for metric in metrics if metric == name or (name.startswith(".") and metric.endswith(name))]
    return write(max(metrics[metric] for metric in named)) if named else ""
