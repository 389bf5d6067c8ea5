"""``slipway rescan``: scans champions with the current vulnerability database."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from rich.markup import escape

from pipeline.commands.show import REFUSED, as_json, print_json, print_table, results, say, styled
from pipeline.settings import Settings

if TYPE_CHECKING:
    from pipeline.operations.rescan import Rescanned


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]…")
@as_json
def rescan(names: Sequence[str], *, as_json: bool) -> None:
    """Scan champions with the current vulnerability database.

    Scans the champion of release line NAME, or of every line: the bill of materials that was signed with the release,
    which takes seconds, or the image if that is not enough. The result is written to the version's tag
    `slipway.rescan`. If the model's file says `scan: {rescan: rollback}` and the policy forbids a new finding, the line
    is rolled back, unless the previous version has forbidden findings too. Exit status 3 if a champion is refused;
    otherwise 1 if one could not be scanned.
    """
    from pipeline.operations.rescan import RescanError
    from pipeline.operations.rescan import rescan as look_again
    from pipeline.orchestration.instance import open_instance
    from pipeline.orchestration.rescan_check import report

    settings = Settings.read()
    failure = None
    try:
        found: Sequence[Rescanned] = look_again(settings, list(names), say)
    except RescanError as error:
        found, failure = error.found, error
    with open_instance(settings) as instance:
        report(instance, settings)
    if as_json:
        rescanned = [{**entry.__dict__, "verdict": entry.verdict.model_dump(mode="json")} for entry in found]
        print_json({"rescanned": rescanned, "failed": {} if failure is None else failure.failed})
    elif found:
        rows = [
            (each.name, each.version, styled(each.verdict.status), each.by, each.action, escape(each.why or "-"))
            for each in found
        ]
        print_table(("name", "version", "scan", "scanned", "action", "why"), rows)
        for each in found:
            results.print(f"{each.name}: {escape(each.verdict.reason)}")
    elif failure is None:
        results.print("there is no champion yet: start with `slipway release demo`")
    if any(entry.verdict.blocks for entry in found):
        sys.exit(REFUSED)
    if failure is not None:
        raise failure
