"""``slipway load`` and ``slipway compare``: load tests of a release line, and FP16 beside its schemes."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import click
from rich.markup import escape
from rich.text import Text

from pipeline.commands.show import REFUSED, as_json, live, print_json, print_table, progress, results, say, styled
from pipeline.settings import Settings

if TYPE_CHECKING:
    from evals.load.comparison import ComparisonRow
    from evals.load.load_test import TrafficProgress
    from pipeline.operations.load_tests import LoadTestResult
    from registry.progress import Progress

_LINE_SECONDS = 5.0
# Seconds of a step of a comparison's capacity search; shorter than a release's, because several schemes are measured.
_STEP_SECONDS = 8.0

_rate = click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Requests per second.")
_seconds = click.option(
    "--seconds", type=click.FloatRange(min=0, min_open=True), help="For how many seconds requests arrive."
)


@click.command()
@click.argument("name")
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="P",
    help="A traffic profile (evals/load/traffic); repeatable. Default: the model's profiles.",
)
@_rate
@_seconds
@click.option("--capacity", is_flag=True, help="Search for the highest rate at which the limits hold.")
@click.option(
    "--faults", is_flag=True, help="Inject faults at the end: dropped connections, overload, a killed server."
)
@as_json
def load(
    name: str,
    profiles: Sequence[str],
    rate: float | None,
    seconds: float | None,
    *,
    capacity: bool,
    faults: bool,
    as_json: bool,
) -> None:
    """Load-test release line NAME, for example demo-awq.

    demo-fp16 is the unquantized model. Serves the image in the sandbox, sends the traffic of one profile after the
    other, and compares the measurements with the limits in the model's file. Every call measures again. Nothing is
    promoted. Exit status 3 if a limit is missed.

    \b
        slipway load demo-awq --profile chat
        slipway load demo-awq --profile burst --rate 2 --seconds 60
        slipway load demo-gptq --capacity --faults
    """  # noqa: D301 - click's mark for a paragraph that is not rewrapped
    from pipeline.operations import load_tests
    from pipeline.orchestration.release import sweep
    from pipeline.stages.context import StageContext

    settings = Settings.read()
    spec, scheme = load_tests.find(name, settings)
    asked: dict[str, Any] = {
        "request_rate": rate, "seconds": seconds, "capacity": {} if capacity else None, "faults": faults or None,
    }  # fmt: skip
    plan = load_tests.changed(spec.load, profiles, {key: value for key, value in asked.items() if value is not None})
    sweep(settings)
    with Figures() as figures:
        done = load_tests.load_now(StageContext(spec, scheme, settings, say), plan, figures)
    if as_json:
        print_json(
            {
                "name": done.name,
                "verdict": done.verdict.model_dump(mode="json"),
                "folder": str(done.folder),
                "page": str(done.page),
                "evidence": done.evidence.model_dump(mode="json", by_alias=True),
            }
        )
    else:
        _show(done)
    sys.exit(REFUSED if done.verdict.blocks else 0)


@click.command()
@click.argument("model")
@click.option("--scheme", "schemes", multiple=True, metavar="S", help="Compare only this scheme with FP16; repeatable.")
@click.option("--profile", metavar="P", help="A traffic profile (evals/load/traffic). Default: the model's first.")
@_rate
@_seconds
@click.option("--capacity/--no-capacity", default=True, show_default=True, help="Search for the capacity of each.")
@click.option(
    "--step-seconds", type=click.FloatRange(min=2), help="Seconds of a step of that search. Default: the model's, or 8."
)
@click.option(
    "--price",
    type=click.FloatRange(min=0),
    help="The machine's price per hour, in dollars. Default: the model's `cost`.",
)
@as_json
def compare(
    model: str,
    schemes: Sequence[str],
    profile: str | None,
    rate: float | None,
    seconds: float | None,
    *,
    capacity: bool,
    step_seconds: float | None,
    price: float | None,
    as_json: bool,
) -> None:
    """Compare MODEL in FP16 and in each scheme under the same load.

    A scheme's serving variants are columns beside it. Writes one page with size, memory, tokens per second, latency at
    equal rate, capacity, and the cost of a million tokens. Earlier measurements under the same traffic are reused. Exit
    status 3 if one misses the limits in the model's file.
    """
    from pipeline.operations import load_tests
    from pipeline.orchestration.release import sweep
    from pipeline.spec import find
    from pipeline.spec import load as load_spec

    settings = Settings.read()
    spec = load_spec(find(model, settings.models))
    for scheme in schemes:
        spec.scheme(scheme)
    if step_seconds is None and spec.load.capacity is None:
        step_seconds = _STEP_SECONDS
    search = {} if step_seconds is None else {"step_seconds": step_seconds}
    changes: dict[str, Any] = {"capacity": search if capacity else None, "faults": False}
    changes |= {key: value for key, value in {"request_rate": rate, "seconds": seconds}.items() if value is not None}
    plan = load_tests.changed(spec.load, [profile] if profile else list(spec.load.profiles)[:1], changes)
    sweep(settings)

    def listener(scheme: str) -> Progress:
        return lambda line: say(f"{scheme:10} {line}")

    rows, verdicts, page = load_tests.compare(
        spec, list(schemes) or list(spec.schemes), plan, settings, listener,
        load_tests.price_per_hour(spec) if price is None else price,
    )  # fmt: skip
    if as_json:
        judged = {scheme: verdict.model_dump(mode="json") for scheme, verdict in verdicts.items()}
        print_json(
            {"model": spec.model, "rows": [row.model_dump() for row in rows], "verdicts": judged, "page": str(page)}
        )
    else:
        _show_comparison(rows)
        for scheme, verdict in verdicts.items():
            results.print(f"\n{scheme} {styled(verdict.status)}: {escape(verdict.reason)}")
        results.print(f"\npage: {escape(str(page))}")
    sys.exit(REFUSED if any(verdict.blocks for verdict in verdicts.values()) else 0)


class Figures:
    """Shows the progress of the traffic: a line that is updated on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._printed = 0.0
        self._last = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        live.drop(self)

    def __call__(self, going: TrafficProgress) -> None:
        """Show the progress of the traffic."""
        line = _figures(going)
        with self._lock:
            if live.shows:
                share = going.answered / going.total if going.phase == "load" and going.total else None
                live.set(self, "", Text.from_markup(line).plain, share)
            elif (
                going.phase == "load"
                and line != self._last
                and time.monotonic() - self._printed > _LINE_SECONDS
                and going.answered
            ):
                self._printed, self._last = time.monotonic(), line
                progress.print(line)


def _figures(going: TrafficProgress) -> str:
    if going.phase != "load":
        return f"[cyan]{going.purpose}[/] {going.phase}"
    parts = [f"{going.answered}/{going.total} answered"]
    parts += [f"[red]{going.errors} errors[/]"] if going.errors else []
    latencies = (
        ("p50", going.p50_latency_ms), ("p95", going.p95_latency_ms), ("first token p95", going.p95_ttft_ms),
    )  # fmt: skip
    parts += [f"{words} {value:,.0f} ms" for words, value in latencies if value is not None]
    parts.append(f"{going.tokens_per_second:,.0f} tokens/s")
    return f"[cyan]{going.purpose}[/] at {going.rate:.3g}/s, {going.elapsed_s:.0f} s: {', '.join(parts)}"


def _show(done: LoadTestResult) -> None:
    from evals.report.load_report import fault_row, limit_row

    rows = [limit_row(name, done.verdict) for name in done.verdict.limits]
    print_table(
        ("limit", "measured", "allowed", "verdict"),
        [(row.name, row.measured, row.limit, styled(row.verdict)) for row in rows],
    )
    for fault in map(fault_row, done.evidence.faults or ()):
        recovery = f", recovery {fault.recovery}" if fault.recovery else ""
        results.print(f"{fault.name}: {fault.verdict}, {escape(fault.seen)}{recovery}")
    if done.evidence.capacity is not None:
        results.print(f"\ncapacity: {done.evidence.capacity.reason}")
    for finding in done.evidence.findings:
        results.print(f"[yellow]note:[/] {escape(finding)}")
    results.print(f"\n{done.name} {styled(done.verdict.status)}: {escape(done.verdict.reason)}")
    results.print(f"the page: {escape(str(done.page))}")


def _show_comparison(rows: Sequence[ComparisonRow]) -> None:
    from evals.report.load_report import lines

    print_table(("measure", *(row.name for row in rows)), [(label, *cells) for label, cells in lines(rows)])
