"""``slipway release``: run it, show it live, and say at the end what was released and what to try next."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from pipeline.commands.show import FAILED, REFUSED, Ticker, as_json, print_json, print_table, results, say, styled
from pipeline.settings import Settings

if TYPE_CHECKING:
    from pipeline.spec import ModelSpec


@click.command()
@click.argument("model")
@click.option("--scheme", "schemes", multiple=True, metavar="S", help="Only this scheme; may be given several times.")
@as_json
def release(model: str, schemes: Sequence[str], *, as_json: bool) -> None:
    """Release MODEL (a name in models/, or a path to such a YAML file) in all of its schemes.

    Runs every stage whose inputs changed, reuses what is there, and promotes what passed every gate. A second run with
    nothing changed says `up-to-date` within seconds.
    """
    from pipeline.orchestration.release import Event, sweep  # noqa: PLC0415
    from pipeline.orchestration.release import release as run  # noqa: PLC0415
    from pipeline.spec import find, load  # noqa: PLC0415

    settings = Settings.read()
    spec = load(find(model, settings.models))
    for scheme in schemes:
        spec.scheme(scheme)
    about_cpu = check_cpu(spec, settings)
    # A service manager's way to say Ctrl-C: containers are removed, not left for the next sweep. A shell's background
    # job is started deaf to Ctrl-C itself, and the runs that are started here would be too.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    ticker = Ticker()
    wanted = list(dict.fromkeys(schemes)) or list(spec.schemes)

    def look_ahead() -> dict[str, list[Event]]:
        from pipeline.orchestration.unchanged import unchanged  # noqa: PLC0415 - takes a second to import, while the runs do too

        sweep(settings)
        told = {scheme: events for scheme in wanted if (events := unchanged(spec, scheme, settings)) is not None}
        if len(told) < len(wanted):
            from pipeline.stages.preflight import foresee  # noqa: PLC0415 - as above

            if about_cpu:
                say(about_cpu)
            foresee(spec, [scheme for scheme in wanted if scheme not in told], settings, say)
        return told

    releases = run(spec.path, wanted, settings, ticker, meanwhile=look_ahead)
    document = {"model": spec.model, "seconds": round(ticker.seconds, 2), "releases": releases}
    if as_json:
        print_json(document)
    else:
        show_releases(spec, releases, ticker.seconds)
    sys.exit(exit_status([entry["outcome"] for entry in releases]))


def check_cpu(spec: ModelSpec, settings: Settings) -> str | None:
    """Return what this machine's CPU means for a release; None where the release is not served on it.

    Raises:
        PlanError: nothing can be served on it; says what to do.
    """
    from containers.image import profile  # noqa: PLC0415
    from pipeline.errors import PlanError  # noqa: PLC0415

    if profile.load(spec.runtime).minimum_driver is not None or not settings.engine_is_here:
        return None
    cpu = settings.cpu
    if cpu.refusal is not None:
        raise PlanError(f"`{spec.model}` is served by `{spec.runtime}`, but {cpu.refusal}")
    return f"CPU: {cpu.model}, {cpu.cores} logical CPUs; {cpu.meaning}"


def exit_status(outcomes: Collection[str]) -> int:
    """The exit status of a release whose schemes ended so: that of the worst ending."""
    return FAILED if "failed" in outcomes else REFUSED if "refused" in outcomes else 0


def show_releases(spec: ModelSpec, releases: Sequence[dict[str, Any]], seconds: float) -> None:
    """The last lines of a release: what, at what loss, how small, how fast, and what to try next."""
    rows = [
        (
            f"{spec.model}-{entry['scheme']}",
            _outcome(entry),
            entry["version"] or "-",
            " ".join(entry["aliases"]) or "-",
            *(shape(entry["measured"]) for _, shape in _FIGURES),
        )
        for entry in releases
    ]
    results.print()
    print_table(("release", "outcome", "version", "aliases", *(title for title, _ in _FIGURES)), rows)
    endings = Counter(entry["outcome"] for entry in releases)
    told = ", ".join(f"{count} {styled(outcome)}" for outcome, count in endings.items())
    results.print(f"\n{told} in {seconds:.0f} s; accuracy and bits a byte are changes against FP16.")
    for entry in releases:
        if entry["error"]:
            line = entry["error"].splitlines()[0]
            results.print(f"\n{spec.model}-{entry['scheme']} {styled(entry['outcome'])}: {escape(line)}")
    results.print("\nTry next:")
    for command, why in _next_steps(spec, releases):
        results.print(f"  {escape(command):46} [dim]{escape(why)}[/]")


def _outcome(entry: Mapping[str, Any]) -> str:
    """How a release ended, and which gate refused it."""
    refusing = [gate["name"] for gate in entry["gates"] if gate["blocks"]] if entry["outcome"] == "refused" else []
    return styled(entry["outcome"]) + (f" by {', '.join(refusing)}" if refusing else "")


def _next_steps(spec: ModelSpec, releases: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Commands that make sense after such endings, and why one would run them."""
    outcomes = {entry["outcome"] for entry in releases}
    good = [f"{spec.model}-{entry['scheme']}" for entry in releases if entry["version"]]
    if "failed" in outcomes:
        yield "slipway doctor", "what this machine lacks; then release again: finished stages are reused"
    if "refused" in outcomes:
        yield f"edit {_short(spec.path)}", "another scheme, or another limit: what was measured is judged anew"
    if good:
        yield f"slipway report {good[0]}", "the evidence on one page, with pictures"
        yield f"slipway pull {good[0]} ./{good[0]}", "what a deployment does: fetch it, verified to the byte"
        yield "slipway status", "every version, and which of them deployments get"
    yield "slipway ui", "the same runs in Dagster, the same versions in MLflow"


def _short(path: Path) -> str:
    """The path as one would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _change(name: str, unit: str) -> Callable[[Mapping[str, float]], str]:
    return lambda measured: f"{100 * measured[name]:+.2f} {unit}" if name in measured else "-"


def _plain(name: str, unit: str) -> Callable[[Mapping[str, float]], str]:
    return lambda measured: f"{measured[name]:,.0f} {unit}".rstrip() if name in measured else "-"


def _size(measured: Mapping[str, float]) -> str:
    if "size_bytes" not in measured:
        return "-"
    return f"{measured['size_bytes'] / 1e6:,.1f} MB, {measured['size_ratio']:.0%} of FP16"


_FIGURES: tuple[tuple[str, Callable[[Mapping[str, float]], str]], ...] = (
    ("accuracy", _change("accuracy_change", "points")),
    ("bits a byte", _change("bits_per_byte_change", "%")),
    ("size", _size),
    ("p95 latency", _plain("p95_latency_ms", "ms")),
    ("tokens/s", _plain("output_tokens_per_second", "")),
)
