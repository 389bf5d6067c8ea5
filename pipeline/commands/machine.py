"""``slipway doctor``, ``ui`` and ``stop``: this machine, and the servers that run on it."""

from __future__ import annotations

import sys

import click
from rich.markup import escape

from pipeline.commands.show import FAILED, as_json, print_json, print_table, progress, say, styled
from pipeline.settings import Settings


@click.command()
@click.option("--fix", is_flag=True, help="Install and start missing parts, as far as possible.")
@click.option("--ray", is_flag=True, help="With --fix: also make the environment of a Ray node.")
@as_json
def doctor(*, fix: bool, ray: bool, as_json: bool) -> None:
    """Check whether this machine can release.

    Shows a remedy for each problem. Checks the container engine, CPU, GPU, Trivy and its database, disk, worker
    environments and MLflow. Exit status 1 if a part that every release needs is missing.
    """
    from pipeline.operations import doctor as checks
    from pipeline.workers.environments import ENVIRONMENTS

    settings = Settings.read()
    if fix:
        checks.repair(settings, say, [*ENVIRONMENTS, "ray"] if ray else ENVIRONMENTS)
    findings = checks.examine(settings)
    if as_json:
        print_json([finding.__dict__ for finding in findings])
    else:
        rows = [(item.part, styled(item.status), escape(item.found), escape(item.remedy)) for item in findings]
        print_table(("part", "status", "found", "remedy"), rows)
    sys.exit(FAILED if any(finding.status == "missing" for finding in findings) else 0)


@click.command()
@click.option("--port", default=3000, show_default=True, help="Dagster's port on 127.0.0.1; MLflow uses the next port.")
def ui(port: int) -> None:
    """Serve the web pages of Dagster and MLflow until Ctrl-C."""
    from pipeline.serving.ui import serve

    serve(Settings.read(), port, progress.print)


@click.command()
def stop() -> None:
    """Stop the container engine that `slipway doctor --fix` started."""
    from containers.engine.engine import stop as stop_engine

    if not stop_engine(Settings.read().home, progress.print):
        progress.print("no private engine was running")
