"""``slipway status``, ``pull``, ``verify`` and ``report``: what is released."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.markup import escape

from pipeline.commands.show import FAILED, as_json, print_json, print_table, progress, results, say
from pipeline.settings import Settings


@click.command()
@click.argument("model", required=False)
@as_json
def status(model: str | None, *, as_json: bool) -> None:
    """Show the versions and aliases of all release lines, or of MODEL."""
    from registry import catalog
    from registry.suggestions import suggestion

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
        progress.print(f"no release of `{model}`{suggestion(model, catalog.names(uri))}")
    else:
        progress.print("nothing is released yet: start with `slipway release demo`")


@click.command()
@click.argument("name")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--replace", is_flag=True, help="Replace another release in DESTINATION.")
@click.option(
    "--if-changed", is_flag=True, help="Like --replace, but exit with status 5 if this release is there already."
)
@click.option(
    "--cache", type=click.Path(path_type=Path), help="A folder that shares files between pulls by hard links."
)
@click.option(
    "--watch", "every", type=float, metavar="SECONDS", help="Keep running, and check for a new release this often."
)
@click.option(
    "--run", metavar="COMMAND", help="With --watch: run COMMAND FOLDER DIGEST after each change; retried if it fails."
)
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
    """Fetch and verify release NAME[@ALIAS] (default @champion), or one that was published at a place.

    DESTINATION appears only after the release is verified. NAME@v3 is version 3. An interrupted pull continues where it
    stopped. Places are hf://, s3://, oci:// and file:, as of `slipway publish`. Exit status: 0 done, 1 failed for now
    (server unreachable, disk full), 3 refused (does not match its signature), 4 no such release, 5 unchanged.
    """
    from pipeline.publishing.places import is_place
    from registry.__main__ import main as light

    settings = Settings.read()
    if is_place(name):
        if replace or if_changed or cache or every is not None or run:
            raise click.UsageError(f"{name} is pulled without other options than --json")
        _pull_from(name, destination, settings, as_json=as_json)
        return
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


def _pull_from(place: str, destination: Path, settings: Settings, *, as_json: bool) -> None:
    from pipeline.publishing.attested import verify_attached_to
    from pipeline.publishing.places import ReleaseFiles, WeightsPlace, opened
    from pipeline.trust import trust_of
    from registry.pull import pull_from

    trust = trust_of(settings)
    with opened(place, settings) as there:
        expected = None
        if isinstance(there, WeightsPlace):
            attested = verify_attached_to(there.registry, there.repository, there.digest, trust)
            expected = attested.verdicts.manifest_digest
        pulled = pull_from(ReleaseFiles(there), place, destination, trusted_keys=trust, expected=expected, progress=say)
    if as_json:
        print_json({"name": pulled.name, "place": place, "manifest_digest": pulled.manifest.digest})
    else:
        found = f"{destination} is {pulled.name}, {pulled.manifest.digest}"
        results.print(escape(f"{found}: signature, files and gates verified"))


@click.command()
@click.argument("release")
@as_json
def verify(release: str, *, as_json: bool) -> None:
    """Verify RELEASE: the folder of a pulled one, or oci://HOST/NAME[:TAG][@sha256:...] in a container registry.

    Of a folder, offline: its signature, the digest of every file, that there are no other files, and that it passed all
    gates. Of an image or artifact: the digest of every layer, the attached signature, and what else is attached.
    """
    from pipeline.publishing.places import is_place
    from registry import VerificationError

    try:
        document, said = _verified_in_registry(release) if is_place(release) else _verified_folder(Path(release))
    except VerificationError as error:
        problems = [{"name": problem.what, "why": problem.why} for problem in error.problems]
        if as_json:
            print_json({"verified": False, "problems": problems})
        else:
            for problem in problems:
                results.print(f"[red]{escape(problem['name'])}[/]: {escape(problem['why'])}")
        sys.exit(FAILED)
    if as_json:
        print_json({"verified": True, **document, "problems": []})
    else:
        results.print(escape(said))


def _verified_folder(folder: Path) -> tuple[dict[str, object], str]:
    from pipeline.trust import trust_of
    from registry import verify as check

    if not folder.is_dir():
        raise click.UsageError(f"`{folder}` is not a folder: give one, or oci://HOST/NAME@sha256:...")
    manifest = check(folder, trust_of(Settings.read())).manifest
    said = f"{folder} is {manifest.name}, {manifest.digest}: signature, files and gates verified"
    return {"manifest_digest": manifest.digest}, said


def _verified_in_registry(uri: str) -> tuple[dict[str, object], str]:
    from pipeline.publishing.attested import verify_in_registry
    from pipeline.trust import trust_of

    found = verify_in_registry(uri, trust_of(Settings.read()), say)
    verdicts = found.attested.verdicts
    said = (
        f"{found.reference} is of {verdicts.release}, {verdicts.manifest_digest}, scanned {verdicts.scan.at}: "
        f"signature, {len(verdicts.statements)} statements, gates and {found.blobs} blobs verified"
    )
    return {
        "reference": found.reference,
        "signer": found.attested.signer,
        "manifest_digest": verdicts.manifest_digest,
        "scanned": verdicts.scan.at,
        "blobs": found.blobs,
        "bytes": found.bytes,
    }, said


@click.command()
@click.argument("name")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Where to write the report. Default: in $SLIPWAY_HOME/reports."
)
@as_json
def report(name: str, out: Path | None, *, as_json: bool) -> None:
    """Fetch the HTML report of release NAME[@ALIAS].

    The report shows accuracy, latency, memory and vulnerabilities, with charts.
    """
    from pipeline.trust import trust_of
    from registry.manifest import REPORT
    from registry.pull import fetch_file

    settings = Settings.read()
    path = out or settings.home / "reports" / f"{name.replace('@', '-')}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    fetch_file(name, REPORT, path, tracking_uri=settings.tracking_uri, trusted_keys=trust_of(settings))
    if as_json:
        print_json({"name": name, "report": str(path)})
    else:
        click.echo(str(path))
