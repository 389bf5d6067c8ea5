"""The command lines: ``slipway`` as click has it, ``slipway-registry`` as argparse has it, and their exit statuses."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator

import click
from fields import cell, page, row

from pipeline.cli import main
from pipeline.commands.show import EXIT_STATUSES
from registry import __main__ as fetching
from registry.served_files import REFUSED


def command_line() -> str:
    """Every command of ``slipway``, with its help."""
    context = click.Context(main, info_name="slipway")
    return page("The `slipway` command", _prose(main.help or ""), _subcommands(main, context))


def _subcommands(group: click.Group, context: click.Context) -> Iterator[str]:
    for name in sorted(group.commands):
        command = group.commands[name]
        inner = click.Context(command, info_name=name, parent=context)
        pieces = " ".join(command.collect_usage_pieces(inner))
        yield f"{'#' * (2 + inner.command_path.count(' ') - 1)} `{inner.command_path}`"
        yield f"```text\n{inner.command_path} {pieces}\n```"
        yield _prose(command.help or "")
        options = [each for each in command.params if isinstance(each, click.Option)]
        if options:
            yield "\n".join(["| option | meaning |", "|---|---|", *(_option(each, inner) for each in options)])
        if isinstance(command, click.Group):
            yield from _subcommands(command, inner)


def _option(option: click.Option, context: click.Context) -> str:
    names, words = option.get_help_record(context) or ("", "")
    return row(f"`{cell(names)}`", cell(words))


def _prose(text: str) -> str:
    """A docstring as Markdown: click's mark for a paragraph that is kept as it is begins a block of code."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    kept = [each.removeprefix("\b\n") for each in paragraphs]
    return "\n\n".join(
        f"```text\n{after}\n```" if before != after else " ".join(after.split())
        for before, after in zip(paragraphs, kept, strict=True)
    )


def registry_command_line() -> str:
    """Every command of ``slipway-registry``, with its help."""
    parser = fetching._parser({})  # noqa: SLF001 - what a machine that only fetches is given
    parts = []
    (commands,) = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]  # noqa: SLF001
    told = {each.dest: each.help for each in commands._choices_actions}  # noqa: SLF001
    for name, command in commands.choices.items():
        actions = [each for each in command._actions if each.dest != "help"]  # noqa: SLF001 - argparse shows them no other way
        rows = [row(f"`{_named(each)}`", cell(each.help or "")) for each in actions]
        parts += [f"## `slipway-registry {name}`", f"{told[name]}".capitalize() + "."]
        parts.append("\n".join(["| argument or option | meaning |", "|---|---|", *rows]))
    intro = "It comes with the distribution `slipway-registry`, for machines that only fetch releases."
    return page("The `slipway-registry` command", intro, parts)


def _named(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    return (
        f"{action.option_strings[-1]}{value}" if action.option_strings else str(action.metavar or action.dest.upper())
    )


def exit_statuses() -> str:
    """What a script may read off the exit status of each command line."""
    tables = {
        "`slipway`, every command but `pull`": EXIT_STATUSES,
        "`slipway pull` and `slipway-registry`": fetching.EXIT_STATUSES,
        "A container of a release's image": {
            REFUSED: "refused: what it was to load is not what was signed, or a setting goes round that check",
        },
    }
    parts = []
    for title, statuses in tables.items():
        rows = [row(f"{status}", cell(meaning)) for status, meaning in statuses.items()]
        parts += [f"## {title}", "\n".join(["| status | meaning |", "|---|---|", *rows])]
    return page("Exit statuses", "", parts)


PAGES = {
    "reference/command-line.md": command_line,
    "reference/registry-command-line.md": registry_command_line,
    "reference/exit-statuses.md": exit_statuses,
}
