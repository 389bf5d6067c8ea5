"""The picture of a mixture: each group of layers with its bits, and what they were predicted and measured to lose."""

from __future__ import annotations

from evals.drift.mixture import MixedGroup, Mixture
from evals.report.svg import WIDTH, Axis, Canvas

_GROUPS = 48  # rows of a picture; of a larger network only those that lose the most are shown
_LEFT, _MIDDLE, _ROW, _TOP = 190, 330, 17, 58


def mixture(found: Mixture) -> str:
    """Draw a row for each group: bits a weight in the format that it has, then its predicted and its measured loss."""
    least = sorted(max(_predicted(group), group.measured) for group in found.groups.values())[-_GROUPS:][0]
    shown = {name: group for name, group in found.groups.items() if max(_predicted(group), group.measured) >= least}
    canvas = Canvas("A format for each group of layers, and what it loses", _TOP + 8 + _ROW * len(shown))
    weights = sum(group.weights for group in found.groups.values())
    words = f"{8 * found.bytes / weights:.2f} of {8 * found.budget_bytes / weights:.2f} bits a weight"
    losses = f"predicted {found.predicted:.5f}, greedily {found.greedy:.5f}, measured {found.measured:.5f} nats a token"
    canvas.text(0, 12, f"{len(shown)} of {len(found.groups)} groups; {words}; {losses}", size=11)
    canvas.key(_LEFT, 30, [("b", "bits a weight")])
    canvas.key(_MIDDLE, 30, [("a", "predicted"), ("warn", "measured")])
    bits = Axis(0, 16, _LEFT, _MIDDLE - 14)
    most = max(max(_predicted(group), group.measured) for group in shown.values())
    loss = Axis(0, most, _MIDDLE, WIDTH - 62)
    canvas.text(_MIDDLE, 48, "loss, nats a token", size=10)
    for row, (name, group) in enumerate(shown.items()):
        y = _TOP + _ROW * row
        label = name.removeprefix("model.")
        canvas.text(0, y + 10, label if len(label) <= 34 else f"…{label[-33:]}", "ink", size=10)
        each = 8 * group.formats[group.chosen].bytes / group.weights
        canvas.box(bits(0), y, bits(each) - bits(0), 12, "b", opacity=0.8)
        canvas.text(bits(0) + 4, y + 10, group.chosen, "ink", size=10)
        canvas.box(loss(0), y, loss(_predicted(group)) - loss(0), 6, "a")
        canvas.box(loss(0), y + 6, loss(group.measured) - loss(0), 6, "warn")
        canvas.text(loss(max(_predicted(group), group.measured)) + 5, y + 10, f"{group.measured:.5f}", size=10)
    return canvas.svg()


def _predicted(group: MixedGroup) -> float:
    return group.formats[group.chosen].loss
