"""The stages, from their table; and schedules and sensors, as Dagster has them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from html import escape
from typing import Any

from dagster import ScheduleDefinition, SensorDefinition
from fields import cell, page, row

from pipeline.definitions import defs
from pipeline.stages.table import STAGES


def stages() -> str:
    """Every stage with what it takes, what it waits for, and its gate."""
    rows = ["| stage | takes | waits for | makes | gate |", "|---|---|---|---|---|"]
    for stage in STAGES:
        takes, waits = (", ".join(f"`{each}`" for each in names) for names in (stage.inputs, stage.waits_for))
        gate = cell(stage.gate.question) if stage.gate else ""
        rows.append(row(f"`{stage.name}`", takes, waits, cell(stage.description), gate))
    return page("Stages", "![The stages of a release](../pictures/stages.svg)", ["\n".join(rows)])


def schedules() -> str:
    """Everything that the daemon starts or watches."""
    tables = [
        ["| schedule | cron | does |", "|---|---|---|"]
        + [row(f"`{each.name}`", f"`{each.cron_schedule}`", _does(each)) for each in _sorted(defs.schedules)],
        ["| sensor | looks every | does |", "|---|---|---|"]
        + [row(f"`{each.name}`", f"{each.minimum_interval_seconds} s", _does(each)) for each in _sorted(defs.sensors)],
        ["| job | does |", "|---|---|"]
        + [row(f"`{each.name}`", cell(each.description or "")) for each in _sorted(defs.jobs)],
    ]
    intro = (
        "They run while `slipway ui` runs, which starts Dagster's daemon. Schedules are in the time zone "
        "`SLIPWAY_TIMEZONE`. See [how to automate releases](../how-to/automate-releases.md)."
    )
    return page("Schedules, sensors and jobs", intro, map("\n".join, tables))


def _sorted(definitions: Iterable[Any] | None) -> list[Any]:
    return sorted(definitions or (), key=lambda each: str(each.name))


def _does(definition: ScheduleDefinition | SensorDefinition) -> str:
    """What a schedule or a sensor does, in its function's words."""
    return cell(definition.description or inspect.getdoc(definition) or "")


_WIDTH, _HEIGHT, _GAP = 84, 36, 18
_PLAIN, _GATE, _ARROW = "#2f6feb", "#b86e00", "#8b8d98"


def picture() -> str:
    """Draw the stages in their order, and mark the gates."""
    width = 2 * 10 + len(STAGES) * (_WIDTH + _GAP) - _GAP
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 72" font-family="system-ui, sans-serif"',
        ' font-size="14" text-anchor="middle" role="img"><title>The stages of a release</title>',
        f'<rect width="{width}" height="72" fill="#fff"/>',
    ]
    for place, stage in enumerate(STAGES):
        left, colour = 10 + place * (_WIDTH + _GAP), _GATE if stage.gate else _PLAIN
        middle = left + _WIDTH // 2
        drawn.append(
            f'<rect x="{left}" y="10" width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="#fff" stroke="{colour}"/>'
        )
        drawn.append(f'<text x="{middle}" y="33" fill="#1c2024">{escape(stage.name)}</text>')
        if stage.gate:
            drawn.append(f'<text x="{middle}" y="62" fill="{colour}" font-size="12">gate</text>')
        if place:
            drawn.append(f'<path d="M{left - _GAP} 28h{_GAP - 6}m-1 -4l7 4l-7 4z" fill="{_ARROW}" stroke="{_ARROW}"/>')
    return "\n".join([*drawn, "</svg>"]) + "\n"


PAGES = {
    "reference/stages.md": stages,
    "reference/schedules.md": schedules,
    "pictures/stages.svg": picture,
}
