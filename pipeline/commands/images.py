"""``slipway image``: compare two images, and build those of Slipway's own programs."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from rich.markup import escape

from pipeline.commands.show import FAILED, as_json, live, print_json, print_table, progress, results, say
from pipeline.settings import Settings

if TYPE_CHECKING:
    from containers.image.program_image import ProgramImage


@click.group()
def image() -> None:
    """Compare two images, or build those of Slipway's own programs."""


@image.command()
@click.argument("one")
@click.argument("other")
@as_json
def diff(one: str, other: str, *, as_json: bool) -> None:
    """Show the differences between images ONE and OTHER; exit status 1 if there are any.

    Each is an image in the container engine (a tag or an id) or a file that `docker save` wrote. Settings are compared
    by key. In layers that differ, files are compared by kind, mode, owner, time, size and content.
    """
    from containers.engine.engine import connect
    from containers.errors import EngineError
    from containers.image.difference import MOST_FILES, compare, view

    settings = Settings.read()
    try:
        client = connect(settings.docker_host, settings.home)
    except EngineError:
        client = None  # files that `docker save` wrote need no engine
    views = [view(each, client) for each in (one, other)]
    found = compare(*views)
    if as_json:
        identities = {"one": views[0].image_id, "other": views[1].image_id}
        print_json({**identities, "differences": [asdict(difference) for difference in found]})
    elif not found:
        results.print(f"no differences: both are {views[0].image_id}")
    else:
        rows = [tuple(escape(cell) for cell in (each.where, each.what, each.one, each.other)) for each in found]
        print_table(("where", "what", "one", "other"), rows[:MOST_FILES])
        if len(rows) > MOST_FILES:
            results.print(f"and {len(rows) - MOST_FILES} more: --json shows all")
    sys.exit(FAILED if found else 0)


@image.command()
@as_json
def gateway(*, as_json: bool) -> None:
    """Build the gateway's image, push it if $SLIPWAY_IMAGE_REGISTRY is set, and print its reference.

    `slipway bundle` uses the image that was pushed last. The same gateway has the same digest wherever it is built.
    """
    from pipeline.serving.gateway_process import build_image

    _show(build_image(Settings.read(), say), as_json=as_json)


@image.command()
@as_json
def pipeline(*, as_json: bool) -> None:
    """Build the image of this pipeline, push it if $SLIPWAY_IMAGE_REGISTRY is set, and print its reference.

    In a cluster it runs Dagster's code location, runs and workers. The same code has the same digest wherever it is
    built.
    """
    from importlib.metadata import version

    from containers.engine.engine import connect
    from containers.image.pipeline_image import pipeline_program
    from containers.image.program_image import build_program_image
    from pipeline.resources import IN_WHEEL, PACKAGES, RESOURCES

    settings = Settings.read()
    program = pipeline_program(PACKAGES, RESOURCES, IN_WHEEL, version("slipway"))
    client = connect(settings.docker_host, settings.home)
    built = build_program_image(client, program, settings.home, say, registry=settings.image_registry)
    _show(built, as_json=as_json)


def _show(built: ProgramImage, *, as_json: bool) -> None:
    if as_json:
        print_json(built.model_dump())
        return
    live.clear()
    click.echo(built.reference)
    if not built.pushed:
        progress.print(
            "[yellow]the image is only in this machine's engine:[/] a cluster can't pull it; set "
            "SLIPWAY_IMAGE_REGISTRY and run this command again"
        )
