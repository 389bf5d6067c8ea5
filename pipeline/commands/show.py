"""Output of the command line: progress on stderr, results on stdout."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipeline.commands.live import LiveDisplay

if TYPE_CHECKING:
    from pipeline.orchestration.release_events import RunEvent

# A pipe or a file has no width: tables are then as wide as their cells, so that a row stays one line.
_ENDLESS = 10_000
# Cells up to this width are never wrapped; on a narrow terminal longer ones are.
_SHORT = 24

FAILED, USAGE, REFUSED, INTERRUPTED = 1, 2, 3, 130
EXIT_STATUSES = {
    0: "done; for a release: promoted, or up to date",
    FAILED: "a stage or the environment failed",
    USAGE: "usage error: an option, a model file, or a scheme or file system that does not support the request",
    REFUSED: "a gate refused",
    INTERRUPTED: "interrupted; the same command continues from there",
}

as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")


class Terminal(Console):
    """A console that escapes control characters in all printed text, including table cells.

    Text from outside can't move the cursor or change the terminal.
    """

    def render_str(self, text: str, **options: Any) -> Text:  # noqa: ANN401 - rich's own
        """Return the text for markup, with control characters escaped."""
        return super().render_str(shown(text, lines=True), **options)


def shown(text: str, *, lines: bool = False) -> str:
    """Return text with control characters escaped (`registry.terminal.printable`)."""
    from registry.terminal import printable

    return printable(text, lines=lines)


class Results(Terminal):
    """Prints results after ending the live display, because stdout may be the same terminal."""

    def print(self, *objects: Any, **options: Any) -> None:  # noqa: ANN401 - rich's own
        """Print as rich does."""
        live.clear()
        super().print(*objects, **options)


progress = Terminal(stderr=True, highlight=False, soft_wrap=True)
results = Results(highlight=False, soft_wrap=True)
live = LiveDisplay(progress)
_SAID = "said"

_STATUS_STYLE = {
    "pass": "green", "fail": "red", "inconclusive": "yellow",
    "promoted": "green", "up-to-date": "green", "refused": "red", "failed": "red",
    "ok": "green", "missing": "red", "warning": "yellow",
}  # fmt: skip


def styled(status: str) -> str:
    """Colour a status word; plain where the terminal has no colours."""
    style = _STATUS_STYLE.get(status)
    return f"[{style}]{status}[/]" if style else status


class Ticker:
    """Prints the events of runs, one line each, with the seconds since the start.

    On a terminal, each running stage has a line with its progress, which is updated in place.
    """

    def __init__(self) -> None:
        """Start the clock."""
        self._started = time.monotonic()
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def __call__(self, scheme: str, event: RunEvent) -> None:
        """Show one event (``pipeline.orchestration.release_events``)."""
        if live.shows and _follow(scheme, event):
            return
        text = _describe(event)
        if text:
            with self._lock:
                progress.print(f"[dim]{self.seconds:7.1f} s[/]  [bold]{escape(scheme):10}[/] {text}")


def _follow(scheme: str, event: RunEvent) -> bool:
    """Update the live display; return whether the event needs no printed line."""
    match event.event:
        case "start":
            live.set((scheme, event.stage), f"{scheme} {event.stage}", "")
            return True
        case "progress":
            counted = _counted(event.text)
            if counted is not None:
                live.set((scheme, event.stage), f"{scheme} {event.stage}", event.text, counted[1])
            return counted is not None
        case "stage":
            live.drop((scheme, event.name))
        case "end":
            live.drop_group(scheme)
    return False


def _counted(line: str) -> tuple[str, float] | None:
    from registry.counting import is_count

    return is_count(line)


def _describe(event: RunEvent) -> str | None:
    match event.event:
        case "start":
            return f"[cyan]{event.stage:10}[/]"
        case "progress":
            return f"[cyan]{event.stage:10}[/] [dim]{escape(event.text)}[/]"
        case "stage":
            how = "cached" if event.cached else f"{event.seconds:.1f} s"
            return f"[cyan]{event.name:10}[/] done, {how}"
        case "gate":
            return f"[cyan]{event.name:10}[/] gate {styled(event.status)}: {escape(event.reason)}"
        case "end":
            error = f": {escape(event.error)}" if event.error else ""
            return f"{styled(event.outcome)}{error}"
    return None


def say(line: str) -> None:
    """Print a line of progress; on a terminal, a count replaces the previous count."""
    counted = _counted(line) if live.shows else None
    if counted is not None:
        live.set(_SAID, "", line, counted[1])
        return
    live.drop(_SAID)
    progress.print(f"[dim]{escape(shown(line))}[/]")


def print_json(document: object) -> None:
    """Print a result as one JSON document to stdout."""
    live.clear()
    click.echo(json.dumps(document, indent=1))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a plain table to stdout; cells are single lines and may hold rich's markup."""
    rows = [[shown(cell) for cell in row] for row in rows]
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, column in enumerate(columns):
        widest = max(cell_len(Text.from_markup(row[index]).plain) for row in rows) if rows else 0
        made.add_column(column, no_wrap=widest <= _SHORT, overflow="fold")
    for row in rows:
        made.add_row(*row)
    if results.is_terminal:
        results.print(made)
        return
    live.clear()
    for line in results.render_lines(made, results.options.update(width=_ENDLESS), pad=False):
        results.file.write("".join(segment.text for segment in line).rstrip() + "\n")
