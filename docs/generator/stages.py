"""The stages, schedules and sensors, as Dagster has them; and the picture of the stages."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable
from html import escape
from typing import Any

from dagster import AssetSpec, ScheduleDefinition, SensorDefinition
from fields import cell, page, row

from pipeline.definitions import defs

_GRAPH = defs.resolve_asset_graph()
_GATES = {
    check.asset_key.to_user_string(): check.name for check in _GRAPH.asset_check_keys if check.name.endswith("_gate")
}


def _stages() -> dict[str, AssetSpec]:
    """Every stage in an order in which it can run."""
    specs = {spec.key: spec for spec in defs.resolve_all_asset_specs()}
    return {key.to_user_string(): specs[key] for key in _GRAPH.toposorted_asset_keys}


def _takes(spec: AssetSpec, order: Collection[str]) -> list[str]:
    taken = {each.asset_key.to_user_string() for each in spec.deps}
    return [name for name in order if name in taken]


def stages() -> str:
    """Every stage with what it takes and its gate."""
    rows = ["| stage | takes | makes | gate |", "|---|---|---|---|"]
    found = _stages()
    for name, spec in found.items():
        takes = ", ".join(f"`{each}`" for each in _takes(spec, found))
        rows.append(
            row(f"`{name}`", takes, cell(spec.description or ""), f"`{_GATES[name]}`" if name in _GATES else "")
        )
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
    names = list(_stages())
    width = 2 * 10 + len(names) * (_WIDTH + _GAP) - _GAP
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 72" font-family="system-ui, sans-serif"',
        ' font-size="14" text-anchor="middle" role="img"><title>The stages of a release</title>',
        f'<rect width="{width}" height="72" fill="#fff"/>',
    ]
    for place, name in enumerate(names):
        left, colour = 10 + place * (_WIDTH + _GAP), _GATE if name in _GATES else _PLAIN
        middle = left + _WIDTH // 2
        drawn.append(
            f'<rect x="{left}" y="10" width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="#fff" stroke="{colour}"/>'
        )
        drawn.append(f'<text x="{middle}" y="33" fill="#1c2024">{escape(name)}</text>')
        if name in _GATES:
            drawn.append(f'<text x="{middle}" y="62" fill="{colour}" font-size="12">gate</text>')
        if place:
            drawn.append(f'<path d="M{left - _GAP} 28h{_GAP - 6}m-1 -4l7 4l-7 4z" fill="{_ARROW}" stroke="{_ARROW}"/>')
    return "\n".join([*drawn, "</svg>"]) + "\n"


PAGES = {
    "reference/stages.md": stages,
    "reference/schedules.md": schedules,
    "pictures/stages.svg": picture,
}
