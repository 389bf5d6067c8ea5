"""Images: what makes two of them different, and the one that is no release's."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click
from rich.markup import escape

from pipeline.commands.show import FAILED, as_json, live, print_json, print_table, progress, results, say
from pipeline.settings import Settings


@click.group()
def image() -> None:
    """Look into images: `slipway image diff A B`. Build the gateway's: `slipway image gateway`."""


@image.command()
@click.argument("one")
@click.argument("other")
@as_json
def diff(one: str, other: str, *, as_json: bool) -> None:
    """Show what differs between images ONE and OTHER; exit status 1 where anything does.

    Each is an image of the engine (a tag or an id), or a file that `docker save` wrote. Settings are compared key by
    key; of layers that differ, every file by kind, mode, owner, time, size and content.
    """
    from containers.engine.engine import connect  # noqa: PLC0415
    from containers.errors import EngineError  # noqa: PLC0415
    from containers.image.difference import MOST_FILES, compare, view  # noqa: PLC0415

    settings = Settings.read()
    try:
        client = connect(settings.docker_host, settings.home)
    except EngineError:
        client = None  # files need none
    views = [view(each, client) for each in (one, other)]
    found = compare(*views)
    if as_json:
        identities = {"one": views[0].image_id, "other": views[1].image_id}
        print_json({**identities, "differences": [asdict(difference) for difference in found]})
    elif not found:
        results.print(f"no difference: both are {views[0].image_id}")
    else:
        rows = [tuple(escape(cell) for cell in (each.where, each.what, each.one, each.other)) for each in found]
        print_table(("where", "what", "one", "other"), rows[:MOST_FILES])
        if len(rows) > MOST_FILES:
            results.print(f"and {len(rows) - MOST_FILES} more: --json shows all")
    sys.exit(FAILED if found else 0)


@image.command()
@as_json
def gateway(*, as_json: bool) -> None:
    """Build the gateway's image, push it to $SLIPWAY_IMAGE_REGISTRY where that is set, and print its reference.

    `slipway bundle` names the one that was pushed last. The same gateway is the same digest, wherever it is built.
    """
    from pipeline.serving.gateway_process import build_image  # noqa: PLC0415

    built = build_image(Settings.read(), say)
    if as_json:
        print_json(built.model_dump())
        return
    live.clear()
    click.echo(built.reference)
    if not built.pushed:
        progress.print(
            "[yellow]it is in this machine's engine alone:[/] a cluster pulls it from a registry; set "
            "SLIPWAY_IMAGE_REGISTRY and run this again"
        )
