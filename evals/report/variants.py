"""The serving configurations of a release side by side: the main one, and each variant with its verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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


def table(verdicts: Sequence[Verdict], load: LoadEvidence | None, variants: Sequence[Variant]) -> list[list[str]]:
    """Return rows of a table with a column for each configuration, the names first; nothing without variants."""
    if not variants:
        return []
    main = {name: value for verdict in verdicts for name, value in verdict.metrics.items()}
    measured = [main, *(variant.metrics for variant in variants)]
    asked = load.server.requested if load is not None else None
    context, cache = (asked and asked.value(flag) for flag in ("--max-model-len", "--kv-cache-dtype"))
    rows = [
        ["", MAIN, *(variant.name for variant in variants)],
        ["listed", "yes", *("yes" if variant.passed else f"no: {_blocking(variant)}" for variant in variants)],
        ["context, tokens", context or "", *(_context(variant) for variant in variants)],
        ["KV cache", cache or "auto", *(variant.serving.kv_cache for variant in variants)],
    ]
    for label, name, write in _SHOWN:
        cells = [_cell(metrics, name, write) for metrics in measured]
        if any(cells):
            rows.append([label, *cells])
    return rows


def _blocking(variant: Variant) -> str:
    return "; ".join(f"{verdict.gate} {verdict.status}" for verdict in variant.verdicts if verdict.blocks)


def _context(variant: Variant) -> str:
    return "" if variant.serving.context is None else str(variant.serving.context)


def _cell(metrics: Mapping[str, float], name: str, write: Callable[[float], str]) -> str:
    named = [metric for metric in metrics if metric == name or (name.startswith(".") and metric.endswith(name))]
    return write(max(metrics[metric] for metric in named)) if named else ""
