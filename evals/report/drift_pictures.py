"""Pictures of the changes behind the accuracies: next-token distributions, and the error of each layer."""

from __future__ import annotations

from collections.abc import Sequence

from evals.drift.pairs import ChoicePairs, Divergence, Drift, Example, Layer
from evals.report.svg import WIDTH, Axis, Canvas

_LEFT, _RIGHT = 116, 22
_LAYERS = 48  # rows of a picture; of a larger network only the worst layers are shown


def divergence(found: Divergence, ceiling: float | None) -> str:
    """Draw the share of positions within a divergence (the curve), its mean and p99, and each bucket of positions."""
    canvas = Canvas("Divergence of next-token distributions from FP16", 252 + 17 * len(found.buckets))
    most = max(found.p99 * 1.5, ceiling or 0.0, found.mean * 1.2, 1e-6)
    across, up = Axis(0, most * 1.02, 44, WIDTH - _RIGHT), Axis(0, 1, 204, 24)
    for value, y in up.ticks(4):
        canvas.line([(across.start, y), (across.end, y)], "grid", width=0.6)
        canvas.text(across.start - 6, y + 4, f"{value:.0%}", anchor="end", size=11)
    for value, x in across.ticks(5):
        canvas.text(x, up.start + 16, f"{value:g}", anchor="middle", size=11)
    canvas.text(across.end, up.start + 30, "nats a token", anchor="end", size=11)
    inside = [(across(value), up(share)) for share, value in found.curve if value <= across.high]
    canvas.line([(across(0), up(0)), *inside], "b", width=2)
    marks = [(found.mean, "mean", "ink"), (found.p99, "p99", "dim")]
    marks += [(ceiling, "ceiling", "bad")] if ceiling is not None else []
    for mark, words, colour in marks:
        canvas.line([(across(mark), up(0)), (across(mark), up(1))], colour, dash="4 3")
        near = across(mark) > WIDTH - 90
        side, anchor = (-4, "end") if near else (4, "start")
        canvas.text(across(mark) + side, _height(words), f"{words} {mark:.4f}", colour, anchor, 11)
    for row, bucket in enumerate(found.buckets):
        words = (
            f"from position {bucket['start']:.0f}: mean {bucket['mean']:.4f}, p99 {bucket['p99']:.3f} nats,"
            f" {bucket['agreement']:.1%} agree on the most likely token"
        )
        canvas.text(44, 252 + 17 * row, words, size=11)
    return canvas.svg()


def layers(found: Sequence[Layer]) -> str | None:
    """Draw each quantized layer's relative output error, in the network's order; of a large network only the worst."""
    if not found:
        return None
    shown = list(found)
    if len(shown) > _LAYERS:
        least = sorted(layer.error for layer in shown)[-_LAYERS]
        shown = [layer for layer in shown if layer.error >= least][:_LAYERS]
    left = 190
    canvas = Canvas("Relative output error of each quantized layer, on calibration text", 26 + 13 * len(shown))
    canvas.text(0, 12, f"{len(shown)} of {len(found)} layers; median of all {_median(found):.2%}", size=11)
    axis = Axis(0, max(layer.error for layer in shown), left, WIDTH - _RIGHT - 40)
    for row, layer in enumerate(shown):
        y = 20 + 13 * row
        name = layer.name.removeprefix("model.")
        canvas.text(0, y + 9, name if len(name) <= 34 else f"…{name[-33:]}", "ink", size=10)
        worse = layer.error > 2 * _median(found)
        canvas.box(axis(0), y, axis(layer.error) - axis(0), 10, "warn" if worse else "b", opacity=0.8)
        canvas.text(axis(layer.error) + 5, y + 9, f"{layer.error:.2%}", size=10)
    return canvas.svg()


def examples(drift: Drift) -> list[tuple[str, Example]]:
    """Return the flips to show, with the task of each."""
    return [
        (name, example)
        for name, pairs in drift.tasks.items()
        if isinstance(pairs, ChoicePairs)
        for example in pairs.examples
    ]


def _median(found: Sequence[Layer]) -> float:
    return sorted(layer.error for layer in found)[len(found) // 2]


def _height(words: str) -> float:
    return {"mean": 40.0, "p99": 58.0, "ceiling": 76.0}[words]
