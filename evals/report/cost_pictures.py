"""The pictures of cost: dollars for a million tokens by way to pay, and a day in owned and rented replicas."""

from __future__ import annotations

from evals.load.cost import CostEvidence
from evals.report.svg import WIDTH, Axis, Canvas

_LEFT, _RIGHT = 190, 84


def per_million(found: CostEvidence) -> str | None:
    """Draw dollars for a million output tokens, one bar for each way to pay."""
    rows = found.rows
    if not rows:
        return None
    canvas = Canvas("Dollars for a million output tokens", 20 + 28 * len(rows))
    axis = Axis(0, max(row.dollars_per_million for row in rows), _LEFT, WIDTH - _RIGHT)
    for number, row in enumerate(rows):
        y = 6 + 28 * number
        canvas.text(0, y + 14, row.what, "ink", size=13)
        colour = "b" if row.dollars_per_hour is not None else "a"
        canvas.box(axis(0), y, axis(row.dollars_per_million) - axis(0), 20, colour)
        canvas.text(axis(row.dollars_per_million) + 6, y + 14, dollars(row.dollars_per_million), "ink")
    return canvas.svg()


def day(found: CostEvidence) -> str | None:
    """Draw the replicas that each hour needs, owned ones at the bottom, and the cost of the cheapest split."""
    planned = found.day
    if planned is None:
        return None
    needed, best = planned.replicas, planned.best
    owned = best.owned if best else 0
    canvas = Canvas("Replicas by the hour", 236)
    canvas.key(44, 14, [("b", "owned"), ("a", "rented")] if best else [("a", "replicas")])
    across, up = Axis(0, 24, 44, WIDTH - 22), Axis(0, max(needed) * 1.05, 190, 30)
    for value, y in up.ticks(min(4, max(needed))):
        canvas.line([(44, y), (WIDTH - 22, y)], "grid", width=0.6)
        canvas.text(38, y + 4, f"{value:g}", anchor="end", size=11)
    for hour, count in enumerate(needed):
        left, width = across(hour) + 1, across(1) - across(0) - 2
        base = min(owned, count)
        canvas.box(left, up(owned), width, up(0) - up(owned), "b", opacity=0.35)
        canvas.box(left, up(base), width, up(0) - up(base), "b")
        canvas.box(left, up(count), width, up(base) - up(count), "a")
    for hour in range(0, 25, 6):
        canvas.text(across(hour), 206, f"{hour}:00", anchor="middle", size=11)
    words = f"{planned.requests_per_day:,.0f} requests a day"
    if best:
        rented, owned_all = planned.hybrids[0], planned.hybrids[-1]
        words += f": {dollars(best.dollars_per_day)} a day with {best.owned} owned; all rented "
        words += f"{dollars(rented.dollars_per_day)}, all owned {dollars(owned_all.dollars_per_day)}"
    canvas.text(44, 228, words, size=11)
    return canvas.svg()


def dollars(value: float) -> str:
    """Write dollars to three significant figures."""
    return f"${value:,.0f}" if value >= 1000 else f"${value:.3g}"
