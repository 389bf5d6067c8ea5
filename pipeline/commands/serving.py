"""``slipway serve`` and ``slipway keys``: serve a release on this machine, and manage its API keys."""

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
@click.option("--replicas", type=click.IntRange(1, 64), default=1, show_default=True, help="Containers per release.")
@click.option("--port", default=8080, show_default=True, help="Port of the API on 127.0.0.1.")
@click.option("--admin-port", default=None, type=int, help="Port for metrics and state. Default: the next port.")
@click.option(
    "--parallel", type=click.IntRange(1), default=64, show_default=True, help="Concurrent requests per replica."
)
@click.option("--every", type=float, default=2.0, show_default=True, help="Seconds between checks of the alias.")
@click.option("--redis", metavar="URL", help="A Redis server through which gateways share the limits of keys.")
@click.option("--variant", metavar="VARIANT", help="A serving variant that the release lists. Default: the main one.")
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
    variant: str | None,
    as_json: bool,
) -> None:
    """Serve release NAME[@ALIAS] (default @champion) until Ctrl-C.

    The API is on 127.0.0.1, with keys and limits. The release is pulled and verified. Its image runs in hardened
    containers behind a gateway with OpenAI's API. When the alias moves to another release, that release is started and
    warmed, the traffic switches to it, and the old one is drained: no request is lost. A canary gets its share of the
    traffic. Make a key with `slipway keys add`. A variant is started only where the release's manifest lists it, which
    means that it passed drift and load.
    """
    from containers.gateway import keys as api_keys
    from pipeline.serving import serve
    from pipeline.serving.gateway_process import key_file
    from registry.resolve import CHAMPION

    settings = Settings.read()
    model, _, alias = name.partition("@")
    metrics_port = port + 1 if admin_port is None else admin_port
    options = serve.Options(replicas, port, metrics_port, parallel, every, redis, variant)

    def announce(running: Serving) -> None:
        gate = running.gateway
        if as_json:
            versions = [{"version": release.version, "weight": release.weight} for release in running.desired]
            print_json({"model": model, "url": gate.url, "admin_url": gate.admin_url, "releases": versions})
            return
        results.print(f"{escape(model)} is served at [bold]{gate.url}/v1[/], metrics at {gate.admin_url}/metrics")
        if not api_keys.read(key_file(settings.home)):
            progress.print("there is no API key yet: make one with `slipway keys add --owner NAME`")

    serve.serve(model, alias or CHAMPION, options, settings, say, announce)


@click.group()
def keys() -> None:
    """Make, list and revoke the API keys of `slipway serve`.

    A running gateway applies changes within a second.
    """


@keys.command()
@click.option("--owner", required=True, help="The owner of the key.")
@click.option("--model", "models", multiple=True, help="A model that the key may use; repeatable. Default: all.")
@click.option("--requests-per-minute", type=click.IntRange(1), help="Default: no limit.")
@click.option(
    "--tokens-per-minute", type=click.IntRange(1), help="Tokens of prompt and answer together. Default: no limit."
)
@click.option("--parallel", type=click.IntRange(1), help="Concurrent requests at each gateway. Default: no limit.")
@click.option("--days", type=click.FloatRange(min=0, min_open=True), help="Days until the key expires. Default: never.")
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
    """Make a key and print it. It can't be shown again: only its hash is kept."""
    from containers.gateway import keys as api_keys
    from pipeline.serving.gateway_process import key_file

    limits = api_keys.Limits(
        requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute, parallel=parallel
    )
    expires = None if days is None else datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
    made, text = api_keys.add(key_file(Settings.read().home), owner, models=models, expires=expires, limits=limits)
    if as_json:
        print_json({"key": text, **made.model_dump(mode="json", exclude={"sha256"})})
    else:
        progress.print(f"key {made.id} of {escape(owner)}; it can't be shown again:")
        click.echo(text)


@keys.command("list")
@as_json
def show(*, as_json: bool) -> None:
    """Show the owner, limits and state of every key; the keys themselves are not kept."""
    from containers.gateway import keys as api_keys
    from pipeline.serving.gateway_process import key_file

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
    """Revoke the key KEY_ID permanently."""
    from containers.gateway import keys as api_keys
    from pipeline.serving.gateway_process import key_file

    revoked = api_keys.revoke(key_file(Settings.read().home), key_id)
    if as_json:
        print_json({"id": revoked.id, "revoked": revoked.model_dump(mode="json")["revoked"]})
    else:
        results.print(f"key {key_id} of {escape(revoked.owner)} is revoked")
