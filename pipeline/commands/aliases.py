"""Which version deployments get: promotion by hand, rollback, canary, and who did it when."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from pipeline.commands.show import as_json, print_json, print_table, progress, results, say
from pipeline.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.operations.retention import Leftover
    from registry.moves import Moved
    from registry.retention import Removal
    from registry.tiers import TierMove

_why = click.option("--why", default="by hand", show_default=True, help="What the audit trail says.")
_version = click.option("--version", required=True, metavar="N", help="The version's number, as in `slipway status`.")


@click.command()
@click.argument("name")
@_version
@_why
@as_json
def promote(name: str, version: str, why: str, *, as_json: bool) -> None:
    """Make version N of release line NAME champion, verified anew; the champion before becomes `previous`.

    Where N is champion already and the audit trail does not say so, or unsigned, this writes that it is to be.
    """
    from registry import promote_version  # noqa: PLC0415

    moved = promote_version(name, version, why=why, **_common())
    _tell(moved, f"version {moved.version} is champion", as_json=as_json)


@click.command()
@click.argument("name")
@_why
@as_json
def rollback(name: str, why: str, *, as_json: bool) -> None:
    """Go back: swap `champion` and `previous` of release line NAME, the old version verified anew.

    Done twice, all is as before. A rollback that was killed is finished by the next one.
    """
    from registry import rollback as go_back  # noqa: PLC0415

    moved = go_back(name, why=why, **_common())
    _tell(moved, f"version {moved.version} is champion again", as_json=as_json)


@click.command()
@click.argument("name")
@_version
@click.option("--weight", type=click.IntRange(0, 100), required=True, help="Percent of the traffic; 0 ends the canary.")
@_why
@as_json
def canary(name: str, version: str, weight: int, why: str, *, as_json: bool) -> None:
    """Record that some of the traffic of NAME is for version N, which `NAME@canary` then names.

    The deployment reads the split from the registered model's tag `slipway.canary`, {"version": "4", "weight": 10}.
    """
    from registry import canary as split  # noqa: PLC0415

    moved = split(name, version, weight, why=why, **_common())
    told = f"version {moved.version} is for {weight}% of the traffic" if weight else "the canary has ended"
    _tell(moved, told, as_json=as_json)


@click.command()
@click.argument("name")
@as_json
def history(name: str, *, as_json: bool) -> None:
    """Show the audit trail of release line NAME: who moved which alias, when, from what, to what, and why."""
    from pipeline.trust import trust_of  # noqa: PLC0415
    from registry.catalog import line, names  # noqa: PLC0415
    from registry.journal import records  # noqa: PLC0415
    from registry.policy import policy_of  # noqa: PLC0415
    from registry.suggestions import suggestion  # noqa: PLC0415

    settings = Settings.read()
    found = line(settings.tracking_uri, name)
    if found is None:
        progress.print(f"there is no release `{name}`{suggestion(name, names(settings.tracking_uri))}")
    journal = [] if found is None else records(found)
    trusted = policy_of(trust_of(settings)).keys
    if as_json:
        print_json(
            [
                {**record.entry.model_dump(mode="json"), "state": record.state, "signed_by": record.signed_by(trusted)}
                for record in journal
            ]
        )
        return
    rows = [
        (
            str(record.entry.number),
            record.entry.when[:19].replace("T", " "),
            record.entry.who,
            record.entry.action if record.state == "done" else f"{record.entry.action} ({record.state})",
            ", ".join(f"{move.alias} {move.before or '-'} > {move.after or '-'}" for move in record.entry.moves),
            "signed" if record.signed_by(trusted) else "-",
            record.entry.why,
        )
        for record in journal
    ]
    if rows:
        columns = ["number", "when (UTC)", "who", "what", "moves", "signature", "why"]
        print_table(columns, [[escape(cell) for cell in row] for row in rows])


@click.command()
@click.option("--keep", default=5, show_default=True, help="Versions of each line that stay in any case, the newest.")
@click.option("--older-than", "days", default=30.0, show_default=True, help="Days that a version stays in any case.")
@click.option("--cache", type=click.Path(path_type=Path), help="A cache of `slipway pull`, to be swept too.")
@click.option("--tier", is_flag=True, help="Move instead: what is unused to $SLIPWAY_COLD_STORE, s3://BUCKET/PREFIX.")
@click.option("--yes", is_flag=True, help="Remove it; without this, what would go is only shown.")
@as_json
def gc(keep: int, days: float, cache: Path | None, *, tier: bool, yes: bool, as_json: bool) -> None:
    """Show, and with --yes remove, versions, uploads and cached files that no alias, no begun act and no limit needs.

    With them go stage artifacts of this home that are older than a day and that neither a version that stays nor the
    last run of a release was made of, and their images. The audit trail stays. Files that a server keeps are removed by
    `mlflow gc` there, once their version is. With --tier nothing is removed: large files of versions that were not read
    for --older-than days and that no alias names go to object storage by digest, and what an alias names comes back. A
    pull reads them wherever they are.
    """
    from pipeline.operations import retention  # noqa: PLC0415 - the engine's client, for those who ask
    from registry.retention import plan, remove  # noqa: PLC0415

    if tier:
        from pipeline.operations.tiering import move  # noqa: PLC0415

        _tell_moves(move(Settings.read(), timedelta(days=days), say, yes=yes), yes=yes, as_json=as_json)
        return
    settings = Settings.read()
    uri = settings.tracking_uri
    registered = plan(uri, keep=keep, older_than=timedelta(days=days), cache=cache)
    if yes:
        registered = remove(registered, uri, say)
    made = retention.plan(settings, retention.kept_manifests(uri, registered), say)
    if yes:
        made = retention.remove(made, settings, say)
    found: list[Removal | Leftover] = [*registered, *made]
    if as_json:
        items = [{"kind": one.kind, "name": one.name, "why": one.why, "bytes": one.bytes} for one in found]
        print_json({"removed": yes, "items": items})
        return
    if found:
        rows = [[one.kind, one.name, f"{one.bytes / 1e6:.1f}", one.why] for one in found]
        print_table(["what", "name", "size, MB", "why"], rows)
    done = "removed" if yes else "would go; `--yes` removes them"
    progress.print(f"{len(found)} of {sum(one.bytes for one in found) / 1e6:.1f} MB {done}")


def _tell_moves(moves: Sequence[TierMove], *, yes: bool, as_json: bool) -> None:
    items = [{"name": one.name, "to": one.to, "why": one.why, "bytes": one.bytes} for one in moves]
    if as_json:
        print_json({"moved": yes, "items": items})
        return
    if moves:
        rows = [[one.name, one.to, f"{one.bytes / 1e6:.1f}", one.why] for one in moves]
        print_table(["what", "to", "size, MB", "why"], rows)
    done = "moved" if yes else "would move; `--yes` moves them"
    progress.print(f"{len(moves)} of {sum(one.bytes for one in moves) / 1e6:.1f} MB {done}")


def _common() -> dict[str, Any]:
    """What every command of this module hands to the registry."""
    from pipeline.trust import signing_key_if_any, trust_of  # noqa: PLC0415

    settings = Settings.read()
    return {
        "tracking_uri": settings.tracking_uri,
        "trusted_keys": trust_of(settings),
        "key": signing_key_if_any(settings),
        "progress": say,
    }


def _tell(moved: Moved, what: str, *, as_json: bool) -> None:
    if as_json:
        print_json(json.loads(json.dumps(asdict(moved))))
        return
    before = f"; before it was {moved.replaced}" if moved.replaced else ""
    note = " (nothing was to be done)" if moved.entry is None else " (begun before, finished now)" * moved.finished
    results.print(escape(f"{moved.name}: {what}{before}{note}"))
