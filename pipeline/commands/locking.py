"""Runtimes: their locks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import click
from rich.markup import escape

from pipeline.commands.show import as_json, print_json, results, say
from pipeline.settings import Settings


@click.command()
@click.argument("profiles", nargs=-1, metavar="[PROFILE]…")
@click.option("--upgrade", is_flag=True, help="Take newer versions where the requirements allow them.")
@as_json
def lock(profiles: Sequence[str], *, upgrade: bool, as_json: bool) -> None:
    """Resolve runtime PROFILE, or all: the base's tag to a digest, requirements to versions with hashes.

    Writes the lock beside the profile in containers/runtimes/ and shows what changed. Nothing else ever resolves: a
    build fails where the lock is of another profile than the one that is there now.
    """
    from containers.image.locking import lock as resolve  # noqa: PLC0415
    from containers.image.profile import names, stated  # noqa: PLC0415

    variables = Settings.read().installer_environment
    done = [resolve(stated(name), say, variables=variables, upgrade=upgrade) for name in profiles or names()]
    if as_json:
        print_json([asdict(each) for each in done])
        return
    for each in done:
        changed = "nothing changed" if not each.changes else f"{len(each.changes)} changes"
        results.print(
            f"{each.name}: {each.packages} packages by hash, {escape(each.base or 'base made here')}: {changed}"
        )
        for line in each.changes:
            results.print(f"  {escape(line)}")
