"""``slipway release``: run the stages, show their progress, and print what was released and what to try next."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape

from pipeline.commands.show import FAILED, REFUSED, Ticker, as_json, print_json, print_table, results, say, styled
from pipeline.settings import Settings

if TYPE_CHECKING:
    from pipeline.orchestration.release_events import SchemeResult
    from pipeline.spec import ModelSpec


@click.command()
@click.argument("model")
@click.option("--scheme", "schemes", multiple=True, metavar="S", help="Release only this scheme; repeatable.")
@as_json
def release(model: str, schemes: Sequence[str], *, as_json: bool) -> None:
    """Quantize, evaluate, scan, load-test, sign and promote MODEL.

    MODEL is a name in models/ or a path to such a YAML file. All of its schemes are released. Only stages whose inputs
    changed run; the others reuse their artifacts. A scheme is promoted if it passes every gate. If nothing changed, the
    command reports `up-to-date` within seconds.
    """
    from pipeline.orchestration.release import release as run
    from pipeline.orchestration.release import sweep
    from pipeline.orchestration.release_events import ReleaseResult, RunEvent
    from pipeline.spec import find, load

    settings = Settings.read()
    spec = load(find(model, settings.models))
    for scheme in schemes:
        spec.scheme(scheme)
    about_cpu = check_cpu(spec, settings)
    # SIGTERM, which service managers send, also removes the containers. A shell starts background jobs with SIGINT
    # ignored, and runs that are started here would inherit that.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    ticker = Ticker()
    wanted = list(dict.fromkeys(schemes)) or list(spec.schemes)

    def look_ahead() -> dict[str, list[RunEvent]]:
        from pipeline.orchestration.unchanged import unchanged
        from pipeline.stages.locked_sources import describe_moved

        sweep(settings)
        for moved in describe_moved(spec, settings):
            say(moved)
        found = ((scheme, unchanged(spec, scheme, settings)) for scheme in wanted)
        unchanged_releases = {scheme: events for scheme, events in found if events is not None}
        if len(unchanged_releases) < len(wanted):
            from pipeline.stages.preflight import foresee

            if about_cpu:
                say(about_cpu)
            foresee(spec, [scheme for scheme in wanted if scheme not in unchanged_releases], settings, say)
        return unchanged_releases

    releases = run(spec.path, wanted, settings, ticker, meanwhile=look_ahead)
    if as_json:
        result = ReleaseResult(model=spec.model, seconds=round(ticker.seconds, 2), releases=tuple(releases))
        print_json(result.model_dump(mode="json"))
    else:
        show_releases(spec, releases, ticker.seconds)
    sys.exit(exit_status([entry.outcome for entry in releases]))


def check_cpu(spec: ModelSpec, settings: Settings) -> str | None:
    """Return a line about this machine's CPU for a release; None if the release is not served on it.

    Raises:
        PlanError: this CPU can't serve the release; says what to do.
    """
    from containers.image import profile
    from pipeline.errors import PlanError

    if profile.load(spec.runtime).minimum_driver is not None or not settings.engine_is_here:
        return None
    cpu = settings.cpu
    if cpu.refusal is not None:
        raise PlanError(f"`{spec.model}` is served by `{spec.runtime}`, but {cpu.refusal}")
    return f"CPU: {cpu.model}, {cpu.cores} logical CPUs; {cpu.meaning}"


def exit_status(outcomes: Collection[str]) -> int:
    """The exit status for the outcomes of a release's schemes: that of the worst one."""
    return FAILED if "failed" in outcomes else REFUSED if "refused" in outcomes else 0


def show_releases(spec: ModelSpec, releases: Sequence[SchemeResult], seconds: float) -> None:
    """Print the outcome of each scheme: loss, size, speed; and what to try next."""
    rows = [
        (
            f"{spec.model}-{entry.scheme}",
            _outcome(entry),
            entry.version or "-",
            " ".join(entry.aliases) or "-",
            *(shape(entry.measured) for _, shape in _FIGURES),
        )
        for entry in releases
    ]
    results.print()
    print_table(("release", "outcome", "version", "aliases", *(title for title, _ in _FIGURES)), rows)
    endings = Counter(entry.outcome for entry in releases)
    outcomes = ", ".join(f"{count} {styled(outcome)}" for outcome, count in endings.items())
    results.print(f"\n{outcomes} in {seconds:.0f} s; accuracy and bits per byte are changes from FP16.")
    for entry in releases:
        if entry.error:
            line = entry.error.splitlines()[0]
            results.print(f"\n{spec.model}-{entry.scheme} {styled(entry.outcome)}: {escape(line)}")
    results.print("\nTry next:")
    for command, why in _next_steps(spec, releases):
        results.print(f"  {escape(command):46} [dim]{escape(why)}[/]")


def _outcome(entry: SchemeResult) -> str:
    """The outcome of a release, and the gates that refused it."""
    refusing = [gate.name for gate in entry.gates if gate.blocks] if entry.outcome == "refused" else []
    return styled(entry.outcome) + (f" by {', '.join(refusing)}" if refusing else "")


def _next_steps(spec: ModelSpec, releases: Sequence[SchemeResult]) -> Iterator[tuple[str, str]]:
    """Commands to try after these outcomes, each with its purpose."""
    outcomes = {entry.outcome for entry in releases}
    good = [f"{spec.model}-{entry.scheme}" for entry in releases if entry.version]
    if "failed" in outcomes:
        yield "slipway doctor", "find what this machine lacks; then release again: finished stages are reused"
    if "refused" in outcomes:
        yield f"edit {_short(spec.path)}", "choose another scheme or limit; measurements are reused"
    if good:
        yield f"slipway report {good[0]}", "the evidence on one page, with charts"
        yield f"slipway pull {good[0]} ./{good[0]}", "fetch and verify the release, as a deployment does"
        yield "slipway status", "all versions, and which of them deployments get"
    yield "slipway ui", "these runs in Dagster, these versions in MLflow"


def _short(path: Path) -> str:
    """The path, relative to the working directory if it is in it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _change(name: str, unit: str) -> Callable[[Mapping[str, float]], str]:
    return lambda measured: f"{100 * measured[name]:+.2f} {unit}" if name in measured else "-"


def _plain(name: str, unit: str) -> Callable[[Mapping[str, float]], str]:
    return lambda measured: f"{measured[name]:,.0f} {unit}".rstrip() if name in measured else "-"


def _size(measured: Mapping[str, float]) -> str:
    if "size_bytes" not in measured:
        return "-"
    of_fp16 = f", {measured['size_ratio']:.0%} of FP16" if "size_ratio" in measured else ""
    return f"{measured['size_bytes'] / 1e6:,.1f} MB{of_fp16}"


_FIGURES: tuple[tuple[str, Callable[[Mapping[str, float]], str]], ...] = (
    ("accuracy", _change("accuracy_change", "points")),
    ("bits per byte", _change("bits_per_byte_change", "%")),
    ("size", _size),
    ("p95 latency", _plain("p95_latency_ms", "ms")),
    ("tokens/s", _plain("output_tokens_per_second", "")),
)
