"""The load test for a person: every limit with its measurement and verdict, faults, findings; and pages of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from evals.load.comparison import Contender, incomparable, table
from evals.load.slo import met, shown
from evals.report import load_pictures, pictures
from evals.report.pictures import shown_bytes
from evals.report.svg import page_colours
from registry.verdict import Verdict

_UNMEASURED = "not measured"
_TONES = {"pass": "good", "fail": "bad", "inconclusive": "warn"}


def section(load: Mapping[str, Any], verdict: Verdict) -> dict[str, Any]:
    """What `load.html.j2` shows: ``limits``, ``faults``, ``findings``, ``facts``."""
    return {
        "limits": [limit_row(name, verdict) for name in verdict.limits],
        "faults": None if load["faults"] is None else [fault_row(fault) for fault in load["faults"]],
        "findings": load["findings"],
        "facts": _facts(load),
    }


def limit_row(name: str, verdict: Verdict) -> dict[str, str]:
    """One limit: what was measured, what is allowed, and the verdict on it alone."""
    measured = verdict.metrics.get(name)
    good = met(name, verdict.metrics, verdict.limits)
    return {
        "name": name,
        "measured": _UNMEASURED if measured is None else shown(name, measured),
        "limit": shown(name, verdict.limits[name]),
        "verdict": "pass" if good else "fail",
        "tone": "good" if good else "bad",
    }


def fault_row(fault: Mapping[str, Any]) -> dict[str, str]:
    """One fault: what was done, what had to hold, what was seen, how long the recovery took of what it may take."""
    taken, limit = fault["seconds"], fault.get("limit_seconds")
    recovery = "" if taken is None else f"{taken:.1f} s" + ("" if limit is None else f" of {limit:g} s")
    tone = "warn" if fault["ok"] is None else "good" if fault["ok"] else "bad"
    return {
        "name": fault["name"], "must": fault["must"], "seen": fault["seen"], "recovery": recovery, "tone": tone,
        "verdict": {"warn": "not inflicted", "good": "held", "bad": "did not hold"}[tone],
    }  # fmt: skip


def _facts(load: Mapping[str, Any]) -> dict[str, str]:
    facts = {}
    for each in load["profiles"]:
        asked, late = each["requested"], each["traffic"]["client_late_ms"].get("p95")
        told = f"{each['traffic']['requests']} requests at {asked['rate']:g}/s for {asked['seconds']:g} s"
        slow = "" if late is None else f"; the client was {late:.0f} ms late at p95"
        facts[f"traffic, {each['name']}"] = told + slow
        hits = each["metrics"].get("prefix_cache_hit_rate")
        if hits is not None:
            facts[f"prefix cache, {each['name']}"] = f"{hits:.0%} of prompt tokens were in it"
        used = each["metrics"].get("kv_cache_used_peak")
        if used is not None:
            waste = each["metrics"].get("kv_cache_waste")
            wasted = "" if waste is None else f", {waste:.0%} of that in half-filled blocks"
            facts[f"KV cache, {each['name']}"] = f"{used:.1%} in use at the fullest{wasted}"
    if load["capacity"]:
        facts["capacity"] = load["capacity"]["reason"]
    memory, client = load["memory"], load["client"]
    if memory.get("expected"):
        facts["memory, predicted"] = memory["expected"]["sentence"]
    if memory.get("hertz"):
        phases = ", ".join(f"{phase} {shown_bytes(peak)}" for phase, peak in memory["phases"].items())
        facts["memory, peaks"] = f"{phases}; {memory['hertz']:.0f} samples a second from {memory['source']}"
    if client.get("cores") is not None:
        told = f"{client['cores']:.2f} cores under way, {client['cpu_seconds']:.1f} s of processor time in all"
        facts["the load generator's own cost"] = told
    if load["server"]["network"]:
        facts["network"] = load["server"]["network"]
    return facts


def write_page(
    path: Path,
    name: str,
    verdict: Verdict,
    load: Mapping[str, Any],
    requests: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
) -> None:
    """Write the page of one load test."""
    limits = verdict.limits
    drawn = [
        ("Latency", pictures.latency(requests, limits)),
        ("Memory", pictures.memory(samples, load["memory"]["limit_bytes"], limits.get("peak_memory_bytes"))),
        ("Capacity", load_pictures.capacity(load["capacity"]) if load["capacity"] else None),
    ]
    _write(
        path,
        title=name,
        subtitle="under load",
        headline=f"{verdict.status}: {verdict.reason}",
        tone=_TONES[verdict.status],
        load=section(load, verdict),
        figures=_figures(drawn),
    )


def _figures(drawn: Sequence[tuple[str, str | None]]) -> list[tuple[str, Markup]]:
    """Headings with their pictures, but for those that there was nothing to draw for."""
    return [(heading, Markup(svg)) for heading, svg in drawn if svg]  # noqa: S704 - our canvas escapes its text


def write_comparison(
    path: Path,
    model: str,
    contenders: Sequence[Contender],
    verdicts: Mapping[str, Verdict],
    price_per_hour: float | None,
) -> list[dict[str, Any]]:
    """Write the page that holds FP16 and every scheme side by side, each with its verdict; return its table."""
    rows = table(contenders, price_per_hour)
    notes = [f"{name}, {verdict.status}: {verdict.reason}" for name, verdict in verdicts.items()]
    notes += [f"Not comparable: {why}." for why in incomparable(contenders)]
    if price_per_hour is not None:
        notes.append(f"Cost of output tokens on a machine of {price_per_hour:g} an hour, kept at its capacity.")
    picture = load_pictures.comparison(rows)
    seen = {verdict.status for verdict in verdicts.values()}
    searched = [(f"Capacity, {each.name}", each.load["capacity"]) for each in contenders if each.load["capacity"]]
    _write(
        path,
        title=model,
        subtitle="FP16 and what it was quantized to",
        headline=_headline(rows),
        tone=next((_TONES[status] for status in ("fail", "inconclusive") if status in seen), "good"),
        picture=Markup(picture) if picture else None,  # noqa: S704 - our canvas escapes its text
        columns=[row["name"] for row in rows],
        rows=_lines(rows),
        notes=notes,
        figures=_figures([(heading, load_pictures.capacity(found)) for heading, found in searched]),
    )
    return rows


def _headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """The best of the schemes in one sentence."""
    base, *others = rows
    told = []
    for row in others:
        parts = [f"{row['size_bytes'] / base['size_bytes']:.0%} of the size"]
        for name, words in (
            ("capacity_requests_per_second", "capacity"),
            ("output_tokens_per_second", "tokens a second"),
        ):
            if row.get(name) and base.get(name):
                parts.append(f"{row[name] / base[name]:.2f} times the {words}")
                break
        told.append(f"{row['name']}: {', '.join(parts)}")
    return "; ".join(told)


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The table's lines: a measure each, a scheme a column."""
    lines = []
    for name in rows[0]:
        if name in {"name", "capacity_interval"} or all(row[name] is None for row in rows):
            continue
        lines.append((label(name), [cell(name, row[name]) for row in rows]))
    return lines


def label(name: str) -> str:
    """A measure's name for a person; its unit stands with the value."""
    return name.removesuffix("_ms").removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")


def cell(name: str, value: float | None) -> str:
    """A measure as the comparison's table shows it."""
    if value is None:
        return _UNMEASURED
    return shown_bytes(value) if name == "size_bytes" else f"{value:.4g}" if "cost" in name else shown(name, value)


def _write(path: Path, **shown_values: Any) -> None:  # noqa: ANN401 - the template's
    from evals.report.report import quoted  # noqa: PLC0415 - the release's report shows this module's section

    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["quoted"] = quoted
    light, dark = page_colours()
    blank: dict[str, Any] = {"picture": None, "columns": [], "rows": [], "notes": [], "load": None, "figures": []}
    colours = {"light": Markup(light), "dark": Markup(dark)}  # noqa: S704 - constants of ours
    path.parent.mkdir(parents=True, exist_ok=True)
    page = environment.get_template("load_page.html.j2").render({**blank, **colours, **shown_values})
    path.write_text(page, encoding="utf-8")
