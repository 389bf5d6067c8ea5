"""The pictures of a release: losses, latency, memory, vulnerabilities, sizes, and the time of each stage.

Each takes evidence and returns SVG, or None where there is nothing to show: what was not measured is never drawn as
zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from containers.sandbox.memory import MemorySample
from containers.scan.evidence import SEVERITIES, ScanEvidence
from evals.drift.pairs import ChoicePairs, Drift, TextPairs
from evals.load.requests import RequestRecord
from evals.load.slo import percentile
from evals.report.svg import WIDTH, Axis, Canvas
from registry.verdict import Verdict

_LEFT, _RIGHT = 116, 22
_BINS = 24


@dataclass(frozen=True)
class StageTime:
    """A stage's seconds, and how many of them its workers took; ``cached``: the seconds are of an earlier run."""

    name: str
    seconds: float
    worker_seconds: float = 0.0
    cached: bool = False


def losses(verdict: Verdict) -> str | None:
    """Draw the drift gate's decision: each task's loss with its interval, as a share of its limit."""
    rows = list(_loss_rows(verdict))
    if not rows:
        return None
    canvas = Canvas("Loss and its confidence interval, against the limit", 44 + 46 * len(rows))
    low = min(-0.25, *(lower for _, lower, _, _, _ in rows)) * 1.05
    high = max(1.25, *(upper for _, _, upper, _, _ in rows)) * 1.05
    axis = Axis(low, high, _LEFT, WIDTH - _RIGHT)
    bottom = 20 + 46 * len(rows)
    canvas.area([(axis(1), 8), (axis(high), 8), (axis(high), bottom), (axis(1), bottom)], "bad", opacity=0.1)
    for value, colour, words in ((0.0, "grid", "no loss"), (1.0, "bad", "limit")):
        canvas.line([(axis(value), 8), (axis(value), bottom)], colour, dash="4 3" if value else "")
        canvas.text(axis(value), bottom + 16, words, anchor="middle")
    for number, (estimate, lower, upper, task, words) in enumerate(rows):
        y = 32 + 46 * number
        colour = "good" if upper <= 1 else "bad" if lower > 1 else "warn"
        canvas.text(0, y + 4, task, "ink", size=13)
        canvas.line([(axis(lower), y), (axis(upper), y)], colour, width=3)
        canvas.dot(axis(estimate), y, colour, 5)
        canvas.text(_LEFT + 4, y + 20, words, size=11)
    return canvas.svg()


def accuracy(drift: Drift, scheme: str) -> str | None:
    """Draw each choice task's accuracy before and after, and the answers lost and gained."""
    tasks = [(name, pairs) for name, pairs in drift.tasks.items() if isinstance(pairs, ChoicePairs) and pairs.items]
    if not tasks:
        return None
    canvas = Canvas(f"Accuracy of FP16 and {scheme}, and the answers that flipped", 30 + 122 * len(tasks))
    canvas.key(_LEFT, 14, [("a", "FP16"), ("b", scheme), ("bad", "lost"), ("good", "gained")])
    axis = Axis(0, 1, _LEFT, WIDTH - _RIGHT - 50)
    for number, (name, pairs) in enumerate(tasks):
        top = 30 + 122 * number
        canvas.text(0, top + 22, name, "ink", size=13)
        canvas.text(0, top + 39, f"{pairs.items:,} items", size=11)
        for row, (colour, right) in enumerate((("a", pairs.baseline_right), ("b", pairs.candidate_right))):
            y = top + 6 + 24 * row
            canvas.box(axis(0), y, axis(right / pairs.items) - axis(0), 18, colour)
            canvas.text(axis(right / pairs.items) + 6, y + 13, f"{right / pairs.items:.2%}", "ink")
        canvas.line([(axis(pairs.chance), top), (axis(pairs.chance), top + 54)], "ink", dash="2 3")
        canvas.text(axis(pairs.chance), top + 67, f"chance {pairs.chance:.0%}", anchor="middle", size=11)
        _flips(canvas, top + 78, pairs)
    return canvas.svg()


def bits(drift: Drift, scheme: str) -> str | None:
    """Draw the increase in bits per byte of each document after quantization, in percent."""
    tasks = [(name, pairs) for name, pairs in drift.tasks.items() if isinstance(pairs, TextPairs) and pairs.documents]
    if not tasks:
        return None
    canvas = Canvas(f"Bits per byte: change of each document from FP16 to {scheme}", 190 * len(tasks))
    for number, (name, pairs) in enumerate(tasks):
        _bits(canvas, 190 * number, name, pairs, scheme)
    return canvas.svg()


def latency(requests: Sequence[RequestRecord], limits: Mapping[str, float]) -> str | None:
    """Draw the share of requests answered within a time: first token and whole answer, with p95 and its limit."""
    good = [request for request in requests if request.answered]
    curves = []
    for column, colour, words in (("ttft_ms", "a", "first token"), ("latency_ms", "b", "whole answer")):
        values = sorted(value for request in good if (value := request.column(column)) is not None)
        if values:
            curves.append((column, colour, words, values))
    if not curves:
        return None
    longest = max(values[-1] for *_, values in curves)
    shown = [limits[f"p95_{column}"] for column, *_ in curves if limits.get(f"p95_{column}", math.inf) <= 2 * longest]
    across, up = Axis(0, max([longest, *shown]) * 1.05, 44, WIDTH - _RIGHT), Axis(0, 1, 216, 30)
    canvas = Canvas("Requests answered within a time", 240 + 17 * len(curves))
    canvas.key(44, 14, [(colour, words) for _, colour, words, _ in curves])
    _grid(canvas, across, up, "ms", lambda value: f"{value:.0%}")
    for column, colour, words, values in curves:
        steps = [(across(0), up(0))]
        for rank, value in enumerate(values):
            steps += [(across(value), up(rank / len(values))), (across(value), up((rank + 1) / len(values)))]
        canvas.line(steps, colour, width=2)
        canvas.dot(across(percentile(values, 95)), up(0.95), colour)
        limit = limits.get(f"p95_{column}")
        if limit is not None and limit in shown:
            canvas.line([(across(limit), up(0)), (across(limit), up(1))], "bad", dash="4 3")
            side, anchor = (4, "start") if across(limit) < WIDTH / 2 else (-4, "end")
            canvas.text(across(limit) + side, up(0.06), f"p95 limit, {words}", "bad", anchor, 11)
    for row, (column, _, words, values) in enumerate(curves):
        limit = limits.get(f"p95_{column}")
        allowed = "" if limit is None else f" of {limit:,.0f} allowed"
        figures = f"{words}: p50 {percentile(values, 50):,.0f} ms, p95 {percentile(values, 95):,.0f} ms{allowed}"
        canvas.text(44, 252 + 17 * row, figures, size=11)
    return canvas.svg()


def memory(samples: Sequence[MemorySample], limit_bytes: float, allowed_bytes: float | None = None) -> str | None:
    """Draw the container's memory over time with its limit, and the peak that the headroom allows."""
    points = [(each.seconds, float(each.memory_bytes)) for each in samples if each.memory_bytes is not None]
    if not points:
        return None
    gib = 2.0**30
    across = Axis(0, points[-1][0], 44, WIDTH - _RIGHT)
    up = Axis(0, max(limit_bytes, *(value for _, value in points)) / gib * 1.06, 216, 30)
    canvas = Canvas("Memory of the container over time", 258)
    _grid(canvas, across, up, "s", lambda value: f"{value:g}")
    canvas.text(4, 16, "GiB")
    busy = [each.seconds for each in samples if each.phase == "load"]
    if busy:
        canvas.area(
            [(across(busy[0]), 30), (across(busy[-1]), 30), (across(busy[-1]), 216), (across(busy[0]), 216)],
            "ink",
            opacity=0.05,
        )
        canvas.text((across(busy[0]) + across(busy[-1])) / 2, 210, "under load", anchor="middle", size=11)
    line = [(across(seconds), up(value / gib)) for seconds, value in _thinned(points)]
    canvas.area([(line[0][0], 216), *line, (line[-1][0], 216)], "b", opacity=0.15)
    canvas.line(line, "b", width=2)
    marks = [(limit_bytes, "bad", "limit")]
    if allowed_bytes is not None and allowed_bytes < limit_bytes:
        marks.append((allowed_bytes, "warn", "allowed peak"))
    for value, colour, words in marks:
        y = up(value / gib)
        canvas.line([(44, y), (WIDTH - _RIGHT, y)], colour, dash="4 3")
        canvas.text(50, y + 13, f"{words} {value / gib:.2f} GiB", colour, size=11)
    # The gate judges this peak: it leaves the faults out, which fill the memory on purpose.
    peak = max((each.memory_bytes or 0 for each in samples if each.phase != "faults"), default=0)
    canvas.text(44, 252, f"peak {peak / gib:.2f} GiB, {peak / limit_bytes:.0%} of the limit", size=11)
    return canvas.svg()


def vulnerabilities(scan: ScanEvidence) -> str | None:
    """Draw the vulnerabilities by severity, and how many of them a newer package version fixes."""
    if scan.database.is_blind:
        return None
    counts, fixable = scan.counts, scan.fixable
    canvas = Canvas("Vulnerabilities in the image, by severity", 30 + 28 * len(SEVERITIES))
    canvas.key(_LEFT, 14, [("bad", "fixed in a newer version"), ("a", "no fix yet")])
    axis = Axis(0, max(1, *(counts[severity] for severity in SEVERITIES)), _LEFT, WIDTH - _RIGHT - 40)
    for row, severity in enumerate(SEVERITIES):
        y = 28 + 28 * row
        total, fixed = counts[severity], fixable[severity]
        canvas.text(0, y + 14, severity.capitalize(), "ink", size=13)
        canvas.line([(axis(0), y), (axis(0), y + 20)], "grid")
        canvas.box(axis(0), y, axis(fixed) - axis(0), 20, "bad")
        canvas.box(axis(fixed), y, axis(total) - axis(fixed), 20, "a")
        canvas.text(axis(total) + 6, y + 14, f"{total:,}", "ink")
    return canvas.svg()


def sizes(before: int, after: int, scheme: str) -> str | None:
    """Draw the checkpoint's size before and after."""
    if before <= 0 or after <= 0:
        return None
    canvas = Canvas(f"Size of the checkpoint, FP16 and {scheme}", 62)
    axis = Axis(0, max(before, after), _LEFT, WIDTH - _RIGHT - 80)
    for row, (words, colour, value) in enumerate((("FP16", "a", before), (scheme, "b", after))):
        y = 4 + 28 * row
        canvas.text(0, y + 15, words, "ink", size=13)
        canvas.box(axis(0), y, axis(value) - axis(0), 20, colour)
        share = "" if row == 0 else f" ({value / before:.0%})"
        canvas.text(axis(value) + 6, y + 15, f"{shown_bytes(value)}{share}", "ink")
    return canvas.svg()


def stages(seconds: Sequence[StageTime]) -> str | None:
    """Draw the time of each stage: its workers' seconds, and the rest."""
    if not seconds:
        return None
    canvas = Canvas("Seconds by stage", 30 + 26 * len(seconds))
    canvas.key(_LEFT, 14, [("b", "worker, engine, container"), ("a", "orchestration")])
    axis = Axis(0, max(stage.seconds for stage in seconds), _LEFT, WIDTH - _RIGHT - 90)
    for row, stage in enumerate(seconds):
        y = 26 + 26 * row
        worker = min(stage.worker_seconds, stage.seconds)
        canvas.text(0, y + 14, stage.name, "ink", size=13)
        canvas.box(axis(0), y, axis(worker) - axis(0), 18, "b")
        canvas.box(axis(worker), y, axis(stage.seconds) - axis(worker), 18, "a")
        canvas.text(
            axis(stage.seconds) + 6, y + 14, f"{stage.seconds:.1f} s{' (reused)' if stage.cached else ''}", "ink"
        )
    return canvas.svg()


def shown_bytes(value: float) -> str:
    """Return bytes with a unit."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}" if value < 10 * size else f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


# Kind of limit → metric, its unit in the picture, and the factor to that unit.
_KINDS = {"max_drop": ("drop", "points", 100), "max_increase": ("increase", "%", 100), "max_mean": ("mean", "nats", 1)}


def _loss_rows(verdict: Verdict) -> list[tuple[float, float, float, str, str]]:
    """Return (estimate, lower, upper, task, words) of each task that was judged, the numbers in shares of its limit."""
    rows = []
    for name, limit in verdict.limits.items():
        task, _, kind = name.rpartition(".")
        key, unit, scale = _KINDS.get(kind, ("", "", 1))
        found = [verdict.metrics.get(f"{task}.{part}") for part in (key, f"{key}_lower", f"{key}_upper")]
        estimate, lower, upper = found
        if not key or limit <= 0 or estimate is None or lower is None or upper is None:
            continue
        ends = f"{scale * lower:+.2f} to {scale * upper:+.2f}" if scale > 1 else f"{lower:.4f} to {upper:.4f}"
        value = f"{scale * estimate:+.2f}" if scale > 1 else f"{estimate:.4f}"
        words = f"{value} {unit} ({ends}), {scale * limit:.2f} allowed"
        rows.append((estimate / limit, lower / limit, upper / limit, task, words))
    return rows


def _flips(canvas: Canvas, top: float, pairs: ChoicePairs) -> None:
    """Draw answers lost to the left and gained to the right of a middle line."""
    lost, gained = len(pairs.lost_ids), len(pairs.gained_ids)
    middle, reach = (_LEFT + WIDTH - _RIGHT) / 2, (WIDTH - _RIGHT - _LEFT) / 2 - 70
    most = max(lost, gained, 1)
    canvas.text(0, top + 17, "flips", "ink", size=13)
    canvas.box(middle - reach * lost / most, top + 4, reach * lost / most, 18, "bad")
    canvas.box(middle, top + 4, reach * gained / most, 18, "good")
    canvas.line([(middle, top), (middle, top + 26)], "ink")
    canvas.text(middle - reach * lost / most - 6, top + 17, f"{lost} lost", "ink", "end")
    canvas.text(middle + reach * gained / most + 6, top + 17, f"{gained} gained", "ink")


def _bits(canvas: Canvas, top: float, name: str, pairs: TextPairs, scheme: str) -> None:
    """Draw a histogram of the documents' changes, with the change over all text."""
    changes = [
        100 * (document.candidate_nats / document.baseline_nats - 1)
        for document in pairs.documents
        if document.baseline_nats > 0
    ]
    before = sum(document.baseline_nats for document in pairs.documents)
    after = sum(document.candidate_nats for document in pairs.documents)
    in_bits = math.log(2) * sum(document.bytes for document in pairs.documents)
    canvas.text(0, top + 16, name, "ink", size=13)
    words = f"FP16 {before / in_bits:.4f}, {scheme} {after / in_bits:.4f} bits per byte"
    canvas.text(_LEFT, top + 16, f"{words} over {len(pairs.documents):,} documents")
    if not changes or before <= 0:
        return
    axis = Axis(min(0.0, *changes), max(0.0, *changes) * 1.001 + 1e-9, _LEFT, WIDTH - _RIGHT)
    width = (axis.high - axis.low) / _BINS
    counts = [0] * _BINS
    for change in changes:
        counts[min(_BINS - 1, int((change - axis.low) / width))] += 1
    up = Axis(0, max(counts), top + 146, top + 34)
    for number, count in enumerate(counts):
        left, right = axis(axis.low + number * width), axis(axis.low + (number + 1) * width)
        canvas.box(left + 0.5, up(count), right - left - 1, up(0) - up(count), "b", opacity=0.75)
    canvas.line([(_LEFT, up(0)), (WIDTH - _RIGHT, up(0))], "grid")
    for value, x in axis.ticks(6):
        canvas.text(x, top + 162, f"{value:+g}%" if value else "0", anchor="middle", size=11)
    canvas.line([(axis(0), top + 30), (axis(0), up(0))], "ink", dash="2 3")
    total = 100 * (after / before - 1)
    canvas.line([(axis(total), top + 30), (axis(total), up(0))], "bad" if total > 0 else "good", width=2)
    canvas.text(_LEFT, top + 180, f"documents by their change; over all text {total:+.2f}%", size=11)


def _grid(canvas: Canvas, across: Axis, up: Axis, unit: str, shown: Any) -> None:  # noqa: ANN401 - a format
    for value, y in up.ticks(4):
        canvas.line([(across.start, y), (across.end, y)], "grid", width=0.6)
        canvas.text(across.start - 6, y + 4, shown(value), anchor="end", size=11)
    for value, x in across.ticks(6):
        canvas.text(x, up.start + 16, f"{value:,g}", anchor="middle", size=11)
    canvas.text(across.end, up.start + 16, unit, size=11)


def _thinned(points: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """Keep the highest point of each step in time, so that peaks stay."""
    size = math.ceil(len(points) / most)
    return [max(points[at : at + size], key=lambda point: point[1]) for at in range(0, len(points), size)]
