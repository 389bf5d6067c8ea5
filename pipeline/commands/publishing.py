"""``slipway publish`` and ``push``: a release on a model hub, in a bucket, in a container registry or in a folder."""

from __future__ import annotations

from dataclasses import asdict

import click
from rich.markup import escape

from pipeline.commands.show import as_json, print_json, results, say
from pipeline.settings import Settings


@click.command()
@click.argument("name")
@click.argument("place")
@click.option("--dry-run", is_flag=True, help="Write nothing; show which files would be written, and the model card.")
@as_json
def publish(name: str, place: str, *, dry_run: bool, as_json: bool) -> None:
    """Publish release NAME[@ALIAS] (default @champion) with a model card.

    PLACE is hf://ORG/NAME[@BRANCH], s3://BUCKET/PREFIX, oci://HOST/NAME[:TAG] or file:FOLDER. It must be empty: nothing
    is overwritten, and the same release is not written again. `slipway pull PLACE FOLDER` fetches and verifies it.
    """
    from pipeline.publishing.publish import publish as write

    done = write(name, place, Settings.read(), say, dry_run=dry_run)
    if as_json:
        print_json({**asdict(done), "dry_run": dry_run})
        return
    what = f"{done.name} version {done.version}, {done.manifest_digest}"
    if not done.files:
        results.print(escape(f"{place} has {what} already: nothing was written"))
        return
    if dry_run:
        results.print(escape(done.card))
        results.print(escape("\n".join(done.files)))
    verb = "would be written" if dry_run else "published"
    results.print(escape(f"{verb} to {place}: {what}, {len(done.files)} files, {done.bytes / 1e6:.1f} MB"))


@click.command()
@click.argument("name")
@click.argument("registry", required=False)
@as_json
def push(name: str, registry: str | None, *, as_json: bool) -> None:
    """Push the image and the weights of release NAME[@ALIAS] (default @champion), and sign them.

    REGISTRY is HOST/PREFIX; the default is the one that the release was pushed to. What is there is not sent again, so
    that after a change of the signing key only its signatures are added. `slipway verify oci://...` checks the result.
    """
    from pipeline.publishing.push import push as write

    pushed = write(name, registry, Settings.read(), say)
    if as_json:
        print_json(pushed)
        return
    for what, reference in pushed.items():
        results.print(escape(f"{what} {reference}"))
