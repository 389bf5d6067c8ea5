"""Serving a release on this machine, and the keys of those who may ask it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click
from rich.markup import escape

from pipeline.commands.show import as_json, print_json, print_table, progress, results, say
from pipeline.settings import Settings

if TYPE_CHECKING:
    from pipeline.serving.serve import Serving


@click.command()
@click.argument("name")
@click.option("--replicas", type=click.IntRange(1, 64), default=1, show_default=True, help="Containers a release.")
@click.option("--port", default=8080, show_default=True, help="The API's port on 127.0.0.1.")
@click.option("--admin-port", default=None, type=int, help="Metrics and state; the port after by default.")
@click.option("--parallel", type=click.IntRange(1), default=64, show_default=True, help="Requests at one replica.")
@click.option("--every", type=float, default=2.0, show_default=True, help="Seconds between looks at the alias.")
@click.option("--redis", metavar="URL", help="Share the keys' limits with other gateways there.")
@as_json
def serve(
    name: str,
    *,
    replicas: int,
    port: int,
    admin_port: int | None,
    parallel: int,
    every: float,
    redis: str | None,
    as_json: bool,
) -> None:
    """Serve release NAME[@ALIAS] (default @champion) on loopback until Ctrl-C, behind keys and limits.

    The release is pulled and verified; its image runs hardened in as many containers as asked for, behind a gateway
    that speaks OpenAI's API. When the alias comes to name another release, that one is started beside, warmed,
    switched to, and the old one drained: no request is lost. A canary gets its share. `slipway keys add` makes a key.
    """
    from containers.gateway import keys as api_keys  # noqa: PLC0415
    from pipeline.serving import serve  # noqa: PLC0415
    from pipeline.serving.gateway_process import key_file  # noqa: PLC0415
    from registry.resolve import CHAMPION  # noqa: PLC0415

    settings = Settings.read()
    model, _, alias = name.partition("@")
    options = serve.Options(replicas, port, port + 1 if admin_port is None else admin_port, parallel, every, redis)

    def announce(running: Serving) -> None:
        gate = running.gateway
        if as_json:
            versions = [{"version": wish.version, "weight": wish.weight} for wish in running.wishes]
            print_json({"model": model, "url": gate.url, "admin_url": gate.admin_url, "releases": versions})
            return
        results.print(f"{escape(model)} is served at [bold]{gate.url}/v1[/], metrics at {gate.admin_url}/metrics")
        if not api_keys.read(key_file(settings.home)):
            progress.print("nobody has a key yet: `slipway keys add --owner NAME`")

    serve.serve(model, alias or CHAMPION, options, settings, say, announce)


@click.group()
def keys() -> None:
    """Make, list and revoke the API keys of `slipway serve`; a running gateway follows within a second."""


@keys.command()
@click.option("--owner", required=True, help="Whose key it is.")
@click.option("--model", "models", multiple=True, help="A model that it is for; all, if none is given. Repeatable.")
@click.option("--requests-per-minute", type=click.IntRange(1), help="No limit, if not given.")
@click.option("--tokens-per-minute", type=click.IntRange(1), help="Prompt and answer together; no limit, if not given.")
@click.option("--parallel", type=click.IntRange(1), help="Requests at a time, at each gateway.")
@click.option("--days", type=click.FloatRange(min=0, min_open=True), help="It expires then; never, if not given.")
@as_json
def add(
    owner: str,
    *,
    models: tuple[str, ...],
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    parallel: int | None,
    days: float | None,
    as_json: bool,
) -> None:
    """Make a key and print it, this once: only its hash is kept."""
    from containers.gateway import keys as api_keys  # noqa: PLC0415
    from pipeline.serving.gateway_process import key_file  # noqa: PLC0415

    limits = api_keys.Limits(
        requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute, parallel=parallel
    )
    expires = None if days is None else datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
    made, text = api_keys.add(key_file(Settings.read().home), owner, models=models, expires=expires, limits=limits)
    if as_json:
        print_json({"key": text, **made.model_dump(mode="json", exclude={"sha256"})})
    else:
        progress.print(f"key {made.id} of {escape(owner)}, shown this once:")
        click.echo(text)


@keys.command("list")
@as_json
def show(*, as_json: bool) -> None:
    """Show every key's owner, limits and state; keys themselves are not kept."""
    from containers.gateway import keys as api_keys  # noqa: PLC0415
    from pipeline.serving.gateway_process import key_file  # noqa: PLC0415

    found = api_keys.read(key_file(Settings.read().home))
    now = datetime.now(UTC)
    if as_json:
        print_json([{**key.model_dump(mode="json", exclude={"sha256"}), "state": key.state(now)} for key in found])
        return
    columns = ("id", "owner", "state", "models", "requests/min", "tokens/min", "parallel", "expires")
    rows = [
        [
            key.id,
            escape(key.owner),
            key.state(now),
            escape(" ".join(key.models)) or "all",
            *(str(limit or "-") for limit in key.limits.model_dump().values()),
            "-" if key.expires is None else f"{key.expires:%Y-%m-%d %H:%M}",
        ]
        for key in found
    ]
    print_table(columns, rows)


@keys.command()
@click.argument("key_id")
@as_json
def revoke(key_id: str, *, as_json: bool) -> None:
    """Take the key KEY_ID back, for good."""
    from containers.gateway import keys as api_keys  # noqa: PLC0415
    from pipeline.serving.gateway_process import key_file  # noqa: PLC0415

    revoked = api_keys.revoke(key_file(Settings.read().home), key_id)
    if as_json:
        print_json({"id": revoked.id, "revoked": revoked.model_dump(mode="json")["revoked"]})
    else:
        results.print(f"key {key_id} of {escape(revoked.owner)} is revoked")
