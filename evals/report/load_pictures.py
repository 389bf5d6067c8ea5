"""The load test's pictures: the server's capacity, and what quantization gains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from evals.load.capacity import Capacity
from evals.load.comparison import ComparisonRow
from evals.report.pictures import shown_bytes
from evals.report.svg import WIDTH, Axis, Canvas

_LEFT, _RIGHT = 52, 56
_COLOURS = {"holds": "good", "misses": "warn", "saturated": "bad", "unclear": "a"}
_WORDS = {"holds": "holds", "misses": "misses the service level", "saturated": "saturated", "unclear": "client late"}


def capacity(found: Capacity) -> str | None:
    """Draw the throughput and the p95 latency at each rate that was tried; capacity, knee and collapse are marked."""
    steps = sorted(found.steps, key=lambda step: step.rate)
    drawn = [step for step in steps if "p95_latency_ms" in step.metrics]
    if len(drawn) < 2:
        return None
    most = drawn[-1].rate
    across, served = Axis(0, 1.05 * most, _LEFT, WIDTH - _RIGHT), Axis(0, 1.1 * most, 216, 34)
    latencies = [step.metrics["p95_latency_ms"] for step in drawn]
    low, high = math.log10(min(latencies) * 0.8), math.log10(max(latencies) * 1.25)
    waited = Axis(low, high, 216, 34)
    canvas = Canvas("Throughput and p95 latency by request rate", 276)
    canvas.key(_LEFT, 14, [("b", "answered a second (left)"), ("ink", "p95 latency (right)")])
    for value, x in across.ticks(6):
        canvas.text(x, 232, f"{value:g}", anchor="middle", size=11)
    for value, y in served.ticks(4):
        canvas.line([(_LEFT, y), (WIDTH - _RIGHT, y)], "grid", width=0.6)
        canvas.text(_LEFT - 6, y + 4, f"{value:g}", anchor="end", size=11)
    for exponent in range(math.ceil(low), math.floor(high) + 1):
        canvas.text(WIDTH - _RIGHT + 6, waited(exponent) + 4, _milliseconds(10.0**exponent), size=11)
    canvas.line([(across(0), served(0)), (across(most), served(most))], "grid", dash="2 3")
    canvas.line([(across(step.rate), served(step.metrics["requests_per_second"])) for step in drawn], "b", width=2)
    canvas.line(
        [(across(step.rate), waited(math.log10(p95))) for step, p95 in zip(drawn, latencies, strict=True)],
        "ink",
        dash="5 3",
    )
    for step, p95 in zip(drawn, latencies, strict=True):
        canvas.dot(across(step.rate), served(step.metrics["requests_per_second"]), "b", 3)
        canvas.dot(across(step.rate), waited(math.log10(p95)), _COLOURS[step.status], 5)
    limit = found.limits.get("p95_latency_ms")
    if limit is not None and low <= math.log10(limit) <= high:
        canvas.line(
            [(_LEFT, waited(math.log10(limit))), (WIDTH - _RIGHT, waited(math.log10(limit)))], "bad", dash="4 3"
        )
        canvas.text(_LEFT + 4, waited(math.log10(limit)) - 4, f"p95 limit {_milliseconds(limit)}", "bad", size=11)
    marks = (
        ("knee", found.knee, "a", 48.0),
        ("capacity", found.requests_per_second, "good", 30.0),
        ("collapse", found.collapse, "bad", 64.0),
    )
    for words, rate, colour, y in marks:
        if rate is not None:
            canvas.line([(across(rate), 34), (across(rate), 216)], colour, dash="3 3")
            canvas.text(across(rate) + (0 if y < 34 else 4), y, words, colour, "middle" if y < 34 else "start", 11)
    canvas.text((_LEFT + WIDTH - _RIGHT) / 2, 246, "requests a second sent", anchor="middle", size=11)
    present = {step.status for step in drawn}
    canvas.key(_LEFT, 268, [(_COLOURS[status], _WORDS[status]) for status in _COLOURS if status in present])
    return canvas.svg()


def comparison(rows: Sequence[ComparisonRow]) -> str | None:
    """Draw each scheme beside FP16, one panel for each measure; the first row is the baseline."""
    panels = [panel for panel in _PANELS if any(row.measure(panel[0]) is not None for row in rows)]
    if not panels or len(rows) < 2:
        return None
    width, across = 920, 3
    height = 34 + 26 * len(rows) + 14
    canvas = Canvas("Each scheme compared with FP16", height * math.ceil(len(panels) / across) + 8, width)
    for number, (name, title, better, shown) in enumerate(panels):
        left, top = (number % across) * (width / across), (number // across) * height
        _panel(canvas, rows, name, title, better, shown, (left, top), width / across - 22)
    return canvas.svg()


def _panel(
    canvas: Canvas,
    rows: Sequence[ComparisonRow],
    name: str,
    title: str,
    better: str,
    shown: Callable[[float], str],
    corner: tuple[float, float],
    width: float,
) -> None:
    """One measure: a bar for each scheme, and how many times as good as the first it is."""
    left, top = corner
    canvas.text(left, top + 18, title, "ink", size=14)
    canvas.text(left + width, top + 18, f"{better} is better", anchor="end", size=10)
    base = rows[0].measure(name)
    values = [row.measure(name) for row in rows]
    most = max((value for value in values if value is not None), default=1.0)
    axis = Axis(0, most or 1.0, left + 52, left + width - 106)
    for number, row in enumerate(rows):
        y, value = top + 32 + 26 * number, values[number]
        canvas.text(left, y + 13, row.name, "ink" if number else "dim", size=12)
        if value is None:
            canvas.text(axis.start, y + 13, "not measured", size=11)
            continue
        colour = "a" if number == 0 else "b"
        canvas.box(axis.start, y, max(1.0, axis(value) - axis.start), 17, colour)
        canvas.text(axis(value) + 6, y + 13, shown(value), "ink", size=11)
        if number and base:
            ratio = base / value if better == "less" and value else value / base
            good = ratio >= 1.005
            words = "the same" if 0.995 < ratio < 1.005 else f"{ratio:.2f} x"
            canvas.text(left + width, y + 13, words, "good" if good else "dim" if ratio > 0.95 else "bad", "end", 12)


def _milliseconds(value: float) -> str:
    return f"{value / 1000:g} s" if value >= 1000 else f"{value:g} ms"


def _plain(unit: str, digits: int = 0) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f} {unit}".rstrip()


# Measure, title, which way is better, and how it is written.
_PANELS: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("size_bytes", "Checkpoint", "less", shown_bytes),
    ("peak_memory_bytes", "Memory at the peak", "less", shown_bytes),
    ("p95_latency_ms", "p95 latency, same rate", "less", _plain("ms")),
    ("p95_ttft_ms", "p95 first token, same rate", "less", _plain("ms")),
    ("p50_tpot_ms", "Time per token", "less", _plain("ms", 2)),
    ("start_seconds", "Cold start", "less", _plain("s", 1)),
    ("capacity_requests_per_second", "Capacity", "more", _plain("/s", 1)),
    ("capacity_output_tokens_per_second", "Tokens a second at capacity", "more", _plain("", 0)),
    ("cost_per_million_tokens", "Cost of a million tokens", "less", _plain("", 3)),
)
