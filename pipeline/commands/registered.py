"""What is released: showing it, fetching it, checking it."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.markup import escape

from pipeline.commands.show import FAILED, as_json, print_json, print_table, progress, results
from pipeline.settings import Settings
from registry.suggestions import suggestion


@click.command()
@click.argument("model", required=False)
@as_json
def status(model: str | None, *, as_json: bool) -> None:
    """Show what is released: every release line with its versions and aliases, or MODEL's alone."""
    from registry import catalog  # noqa: PLC0415

    uri = Settings.read().tracking_uri
    columns = ("name", "version", "aliases", "created", "manifest_digest")
    rows = [
        (found.name, found.version, found.aliases, f"{found.created:%Y-%m-%d %H:%M:%S}", found.manifest_digest)
        for found in catalog.lines(uri, model)
    ]
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    elif rows:
        shown = [(name, number, " ".join(aliases), *rest) for name, number, aliases, *rest in rows]
        print_table([name.replace("_", " ") for name in columns], [[str(cell or "-") for cell in row] for row in shown])
    elif model:
        progress.print(f"nothing of `{model}` is released{suggestion(model, catalog.names(uri))}")
    else:
        progress.print("nothing is released yet: `slipway release demo`")


@click.command()
@click.argument("name")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--replace", is_flag=True, help="Let another release there give way.")
@click.option("--if-changed", is_flag=True, help="The same, and exit with 5 where it is this one.")
@click.option(
    "--cache", type=click.Path(path_type=Path), help="Keep files for other pulls there, and take them by link."
)
@click.option("--watch", "every", type=float, metavar="SECONDS", help="Go on, looking that often for another release.")
@click.option("--run", metavar="COMMAND", help="With --watch: run COMMAND FOLDER DIGEST, again where it failed.")
@as_json
def pull(
    name: str,
    destination: Path,
    *,
    replace: bool,
    if_changed: bool,
    cache: Path | None,
    every: float | None,
    run: str | None,
    as_json: bool,
) -> None:
    """Fetch release NAME[@ALIAS] (default @champion) into DESTINATION, verified before it appears there.

    NAME@v3 is version 3. What a pull that was cut off had fetched is not fetched again. Exit status: 0 done, 1 not now
    (no server, no disk), 3 refused (not what was signed), 4 no such release, 5 unchanged.
    """
    from registry.__main__ import main as light  # noqa: PLC0415

    settings = Settings.read()
    arguments = ["watch" if every is not None else "pull", name, str(destination)]
    arguments += ["--tracking-uri", settings.tracking_uri]
    if settings.policy is not None:
        arguments += ["--policy", str(settings.policy)]
    for path in settings.trusted_keys:
        arguments += ["--key", str(path)]
    for flag, value in (("--cache", cache), ("--every", every), ("--run", run)):
        arguments += [flag, str(value)] if value is not None else []
    arguments += ["--replace"] * replace + ["--if-changed"] * if_changed + ["--json"] * as_json
    sys.exit(light(arguments, {}))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@as_json
def verify(folder: Path, *, as_json: bool) -> None:
    """Check a pulled release, offline: its signature, every file's digest, nothing added, every gate passed."""
    from pipeline.trust import trust_of  # noqa: PLC0415
    from registry import VerificationError  # noqa: PLC0415
    from registry import verify as check  # noqa: PLC0415

    try:
        manifest = check(folder, trust_of(Settings.read())).manifest
    except VerificationError as error:
        problems = [{"name": problem.what, "why": problem.why} for problem in error.problems]
        if as_json:
            print_json({"verified": False, "problems": problems})
        else:
            for problem in problems:
                results.print(f"[red]{escape(problem['name'])}[/]: {escape(problem['why'])}")
        sys.exit(FAILED)
    if as_json:
        print_json({"verified": True, "manifest_digest": manifest.digest, "problems": []})
    else:
        where = escape(str(folder))
        results.print(f"{where} is {manifest.name}, {manifest.digest}: signature, files and gates verified")


@click.command()
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), help="Write the report there, not into $SLIPWAY_HOME/reports.")
@as_json
def report(name: str, out: Path | None, *, as_json: bool) -> None:
    """Fetch the HTML report of release NAME[@ALIAS]: accuracy, latency, memory, vulnerabilities, with pictures."""
    from pipeline.trust import trust_of  # noqa: PLC0415
    from registry.manifest import REPORT  # noqa: PLC0415
    from registry.pull import fetch_file  # noqa: PLC0415

    settings = Settings.read()
    path = out or settings.home / "reports" / f"{name.replace('@', '-')}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    fetch_file(name, REPORT, path, tracking_uri=settings.tracking_uri, trusted_keys=trust_of(settings))
    if as_json:
        print_json({"name": name, "report": str(path)})
    else:
        click.echo(str(path))
