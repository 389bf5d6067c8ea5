"""What the command line shows: progress on stderr, results on stdout."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipeline.commands.live import LiveDisplay

# A pipe or a file has no width: there a table is as wide as its cells, so that a line stays a line.
_ENDLESS = 10_000
# Cells up to this width are never broken; a terminal too narrow for all of them breaks the longer ones.
_SHORT = 24

FAILED, USAGE, REFUSED, INTERRUPTED = 1, 2, 3, 130
EXIT_STATUSES = {
    0: "done; of a release: promoted, or up to date",
    FAILED: "a stage or the environment failed",
    USAGE: "usage: an option, a model file, or a scheme or a file system that can't do what is asked",
    REFUSED: "a gate refused",
    INTERRUPTED: "interrupted; the same command goes on from there",
}

as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")


class Terminal(Console):
    """A console that shows what is printed as text, wherever it came from: no character of it acts on the terminal.

    Everything that is printed as a string goes through here, cells of tables too.
    """

    def render_str(self, text: str, **options: Any) -> Text:  # noqa: ANN401 - rich's own
        """Return the text for markup, with what a terminal would act on escaped."""
        return super().render_str(shown(text, lines=True), **options)


def shown(text: str, *, lines: bool = False) -> str:
    """Return text from outside as a terminal may show it (`registry.terminal.printable`)."""
    from registry.terminal import printable  # noqa: PLC0415 - the command line starts without the registry

    return printable(text, lines=lines)


class Results(Terminal):
    """Prints results, below what was shown live: that ends first, for stdout may be the same terminal."""

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
    """Prints what runs tell, a line an event, with the seconds since the start.

    On a terminal what is under way, and how far it is, is in a line of its own that is written over.
    """

    def __init__(self) -> None:
        """Start the clock."""
        self._started = time.monotonic()
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def __call__(self, scheme: str, event: Mapping[str, Any]) -> None:
        """Show one event (see ``pipeline.orchestration.events``)."""
        if live.shows and _follow(scheme, event):
            return
        text = _describe(event)
        if text:
            with self._lock:
                progress.print(f"[dim]{self.seconds:7.1f} s[/]  [bold]{escape(scheme):10}[/] {text}")


def _follow(scheme: str, event: Mapping[str, Any]) -> bool:
    """Show on the terminal what is under way; return whether that is all there is to show of the event."""
    match event["event"]:
        case "start":
            live.set((scheme, event["stage"]), f"{scheme} {event['stage']}", "")
            return True
        case "progress":
            counted = _counted(event["text"])
            if counted is not None:
                live.set((scheme, event["stage"]), f"{scheme} {event['stage']}", event["text"], counted[1])
            return counted is not None
        case "stage":
            live.drop((scheme, event["name"]))
        case "end":
            live.drop_group(scheme)
    return False


def _counted(line: str) -> tuple[str, float] | None:
    from registry.counting import is_count  # noqa: PLC0415 - with its package, which `--help` does without

    return is_count(line)


def _describe(event: Mapping[str, Any]) -> str | None:
    match event["event"]:
        case "start":
            return f"[cyan]{event['stage']:10}[/]"
        case "progress":
            return f"[cyan]{event['stage']:10}[/] [dim]{escape(event['text'])}[/]"
        case "stage":
            how = "cached" if event["cached"] else f"{event['seconds']:.1f} s"
            return f"[cyan]{event['name']:10}[/] done, {how}"
        case "gate":
            return f"[cyan]{event['name']:10}[/] gate {styled(event['status'])}: {escape(event['reason'])}"
        case "end":
            error = f": {escape(event['error'])}" if event.get("error") else ""
            return f"{styled(event['outcome'])}{error}"
    return None


def say(line: str) -> None:
    """Show a line of progress; on a terminal a count takes the place of the one before."""
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
    """Print a plain table to stdout; cells may hold rich's markup, and are a line each."""
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
