"""The stages, from their table; and schedules and sensors, as Dagster has them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from html import escape
from statistics import mean
from typing import Any

from dagster import ScheduleDefinition, SensorDefinition
from fields import cell, page, row

from pipeline.definitions import defs
from pipeline.stages.stage import Stage
from pipeline.stages.table import BY_NAME, STAGES


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


_WIDTH, _HEIGHT = 104, 40
_ACROSS, _DOWN = 168, 68
_PLAIN, _GATE, _ARROW = "#2f6feb", "#b86e00", "#8b8d98"


def graph() -> str:
    """Draw each stage to the right of its inputs. An arrow that follows from others is left out."""
    at = _positions()
    top, right = min(y for _, y in at.values()), max(x for x, _ in at.values())
    width = round(right * _ACROSS) + _WIDTH + 20
    height = round((max(y for _, y in at.values()) - top) * _DOWN) + _HEIGHT + 36
    place = {name: (10 + round(x * _ACROSS), 10 + round((y - top) * _DOWN)) for name, (x, y) in at.items()}
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif"',
        ' font-size="14" text-anchor="middle" role="img"><title>The stages of a release and their inputs</title>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">',
        f'<path d="M0 0l8 4l-8 4z" fill="{_ARROW}"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for stage in STAGES:
        left, up = place[stage.name]
        colour = _GATE if stage.gate else _PLAIN
        for name in _direct_inputs(stage):
            start, level = place[name][0] + _WIDTH, place[name][1] + _HEIGHT // 2
            bend = (start + left) // 2
            drawn.append(
                f'<path d="M{start} {level}C{bend} {level} {bend} {up + _HEIGHT // 2} {left} {up + _HEIGHT // 2}" '
                f'fill="none" stroke="{_ARROW}" stroke-width="1.5" marker-end="url(#tip)"/>'
            )
        drawn.append(
            f'<rect x="{left}" y="{up}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="#fff" stroke="{colour}"/>'
        )
        middle = left + _WIDTH // 2
        drawn.append(f'<text x="{middle}" y="{up + 25}" fill="#1c2024">{escape(stage.name)}</text>')
        if stage.gate:
            drawn.append(f'<text x="{middle}" y="{up + 54}" fill="{colour}" font-size="12">gate</text>')
    return "\n".join([*drawn, "</svg>"]) + "\n"


def _positions() -> dict[str, tuple[float, float]]:
    """The column and the row of each stage: right of its inputs, beside them, the shorter way to the end higher."""
    column: dict[str, int] = {}
    for stage in STAGES:
        column[stage.name] = max((column[name] + 1 for name in stage.inputs), default=0)
    remaining = dict.fromkeys(column, 0)
    for stage in reversed(STAGES):
        for name in stage.inputs:
            remaining[name] = max(remaining[name], remaining[stage.name] + 1)
    at: dict[str, tuple[float, float]] = {}
    for number in range(max(column.values()) + 1):
        level = {
            stage.name: mean([at[name][1] for name in _direct_inputs(stage)] or [0.0])
            for stage in STAGES
            if column[stage.name] == number
        }
        ordered = sorted(level, key=lambda name: (remaining[name], level[name]))
        top = mean(level.values()) - (len(ordered) - 1) / 2
        at |= {name: (number, top + row) for row, name in enumerate(ordered)}
    return at


def _direct_inputs(stage: Stage) -> list[str]:
    """The inputs of a stage that are not also inputs of its other inputs."""
    behind = {further for name in stage.inputs for further in _all_inputs(name)}
    return [name for name in stage.inputs if name not in behind]


def _all_inputs(name: str) -> set[str]:
    inputs = BY_NAME[name].inputs
    return {*inputs, *(further for each in inputs for further in _all_inputs(each))}


PAGES = {
    "reference/stages.md": stages,
    "reference/schedules.md": schedules,
    "pictures/stages.svg": graph,
}
