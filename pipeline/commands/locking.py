"""``slipway lock``: pins the base image and the packages of runtimes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import click
from rich.markup import escape

from pipeline.commands.show import as_json, print_json, results, say
from pipeline.settings import Settings


@click.command()
@click.argument("profiles", nargs=-1, metavar="[PROFILE]…")
@click.option("--upgrade", is_flag=True, help="Take newer versions if the requirements allow them.")
@as_json
def lock(profiles: Sequence[str], *, upgrade: bool, as_json: bool) -> None:
    """Pin the base image and packages of runtime PROFILE, or of all.

    The base image is pinned by digest, requirements by version and hash. Writes the lock beside the profile in
    containers/runtimes/ and shows the changes. Only this command resolves versions: if the profile changed after its
    lock was written, building the image fails. The options of a version of vLLM that is new here are read from its CPU
    build, which is installed in a temporary folder.
    """
    from containers.image.locking import lock as resolve
    from containers.image.profile import names, stated

    variables = Settings.read().installer_environment
    done = [resolve(stated(name), say, variables=variables, upgrade=upgrade) for name in profiles or names()]
    if as_json:
        print_json([asdict(each) for each in done])
        return
    for each in done:
        changed = "no changes" if not each.changes else f"{len(each.changes)} changes"
        results.print(
            f"{each.name}: {each.packages} packages with hashes, {escape(each.base or 'base built here')}: {changed}"
        )
        for line in each.changes:
            results.print(f"  {escape(line)}")
