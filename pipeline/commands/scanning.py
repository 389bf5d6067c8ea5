"""What is released, under today's vulnerability database."""

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
    """Scan what is champion today with today's database: release line NAME, or all of them.

    By the bill of materials that was signed with the release, in seconds, where it suffices, by the image otherwise.
    The version is marked with the tag `slipway.rescan`. Where its model's file says `scan: {rescan: rollback}`, a new
    finding that the policy forbids rolls it back, if the version before is any better. Exit status 3 where a champion
    is refused, 1 where none is and one could not be looked at; the others are looked at all the same.
    """
    from pipeline.operations.rescan import RescanError  # noqa: PLC0415
    from pipeline.operations.rescan import rescan as look_again  # noqa: PLC0415
    from pipeline.orchestration.instance import open_instance  # noqa: PLC0415
    from pipeline.orchestration.rescan_check import report  # noqa: PLC0415

    settings = Settings.read()
    failure = None
    try:
        found: Sequence[Rescanned] = look_again(settings, list(names), say)
    except RescanError as error:
        found, failure = error.found, error
    with open_instance(settings) as instance:
        report(instance, settings)
    if as_json:
        told = [{**entry.__dict__, "verdict": entry.verdict.model_dump(mode="json")} for entry in found]
        print_json({"rescanned": told, "failed": {} if failure is None else failure.failed})
    elif found:
        rows = [
            (each.name, each.version, styled(each.verdict.status), each.by, each.action, escape(each.why or "-"))
            for each in found
        ]
        print_table(("name", "version", "scan", "by", "done", "why"), rows)
        for each in found:
            results.print(f"{each.name}: {escape(each.verdict.reason)}")
    elif failure is None:
        results.print("nothing is champion yet: `slipway release demo`")
    if any(entry.verdict.blocks for entry in found):
        sys.exit(REFUSED)
    if failure is not None:
        raise failure
