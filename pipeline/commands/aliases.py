"""Commands that decide which version deployments get: promote, rollback, canary, history, gc."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import click
from rich.markup import escape

from pipeline.commands.show import as_json, print_json, print_table, progress, results, say
from pipeline.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.operations.retention import Leftover
    from registry.journal import JournalEntry
    from registry.moves import Moved
    from registry.policy import Trust
    from registry.progress import Progress
    from registry.retention import Removal
    from registry.signing import SigningKey
    from registry.tiers import TierMove

_why = click.option("--why", default="by hand", show_default=True, help="The reason that the audit trail records.")
_version = click.option("--version", required=True, metavar="N", help="The version's number (see `slipway status`).")


@click.command()
@click.argument("name")
@_version
@_why
@as_json
def promote(name: str, version: str, why: str, *, as_json: bool) -> None:
    """Make version N of release line NAME the champion.

    The version is verified again first. The champion so far becomes `previous`. If N is the champion already, but the
    audit trail has no signed record of it, this command adds that record. The file in Git that the model file names
    under `registry.git` is written; if it could not be pushed before, it is pushed now.
    """
    from registry import promote_version

    moved = promote_version(name, version, why=why, **_common())
    _report(moved, f"version {moved.version} is champion", as_json=as_json)


@click.command()
@click.argument("name")
@_why
@as_json
def rollback(name: str, why: str, *, as_json: bool) -> None:
    """Swap `champion` and `previous` of release line NAME.

    The previous version is verified again first. A second rollback undoes the first. If a rollback was killed, the next
    one finishes it.
    """
    from registry import rollback as go_back

    moved = go_back(name, why=why, **_common())
    _report(moved, f"version {moved.version} is champion again", as_json=as_json)


@click.command()
@click.argument("name")
@_version
@click.option("--weight", type=click.IntRange(0, 100), required=True, help="Percent of the traffic; 0 ends the canary.")
@_why
@as_json
def canary(name: str, version: str, weight: int, why: str, *, as_json: bool) -> None:
    """Assign a share of NAME's traffic to version N.

    `NAME@canary` then names that version. `slipway serve` follows the split at once. Other deployments read it from the
    registered model's tag `slipway.canary`, for example {"version": "4", "weight": 10}.
    """
    from registry import canary as split

    moved = split(name, version, weight, why=why, **_common())
    done = f"version {moved.version} gets {weight}% of the traffic" if weight else "the canary has ended"
    _report(moved, done, as_json=as_json)


@click.command()
@click.argument("name")
@as_json
def history(name: str, *, as_json: bool) -> None:
    """Show the audit trail of release line NAME.

    It lists every move of an alias: who moved it, when, from which version to which, and why.
    """
    from pipeline.trust import trust_of
    from registry.catalog import line, names
    from registry.journal import records
    from registry.policy import policy_of
    from registry.suggestions import suggestion

    settings = Settings.read()
    found = line(settings.tracking_uri, name)
    if found is None:
        progress.print(f"there is no release line `{name}`{suggestion(name, names(settings.tracking_uri))}")
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
            _what(record.entry),
            "signed" if record.signed_by(trusted) else "-",
            record.entry.why,
        )
        for record in journal
    ]
    if rows:
        columns = ["number", "when (UTC)", "who", "what", "moves", "signature", "why"]
        print_table(columns, [[escape(cell) for cell in row] for row in rows])


@click.command()
@click.option(
    "--keep", default=5, show_default=True, help="How many of the newest versions of each release line always stay."
)
@click.option(
    "--older-than", "days", default=30.0, show_default=True, help="Versions younger than so many days always stay."
)
@click.option("--cache", type=click.Path(path_type=Path), help="A cache of `slipway pull` to clean up too.")
@click.option(
    "--tier",
    is_flag=True,
    help="Move unused files to $SLIPWAY_COLD_STORE (s3://BUCKET/PREFIX) instead of removing them.",
)
@click.option("--yes", is_flag=True, help="Remove; without this option the command only shows what it would remove.")
@as_json
def gc(keep: int, days: float, cache: Path | None, *, tier: bool, yes: bool, as_json: bool) -> None:
    """Show or remove versions, files and images that nothing uses.

    Without --yes nothing is removed. A version stays if it has an alias, if it is among the --keep newest, if it is
    younger than --older-than days, or if a promotion or rollback of it is unfinished. A stage artifact and its image
    stay if a version that stays or the last run of a release was made from them, or if they are younger than a day. The
    finished layers of a quantization that was cut off stay for a day, too. The audit trail always stays. A remote
    MLflow server keeps the files of removed versions until `mlflow gc` runs there.

    With --tier nothing is removed. Large files of versions without an alias that were not read for --older-than days
    move to object storage; files of versions with an alias come back. `slipway pull` reads them from either place.
    """
    from pipeline.operations import retention
    from registry.retention import plan, remove

    if tier:
        from pipeline.operations.tiering import move

        _report_moves(move(Settings.read(), timedelta(days=days), say, yes=yes), yes=yes, as_json=as_json)
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
    done = "removed" if yes else "can be removed: run again with `--yes`"
    progress.print(f"{len(found)} items, {sum(one.bytes for one in found) / 1e6:.1f} MB, {done}")


def _report_moves(moves: Sequence[TierMove], *, yes: bool, as_json: bool) -> None:
    items = [{"name": one.name, "to": one.to, "why": one.why, "bytes": one.bytes} for one in moves]
    if as_json:
        print_json({"moved": yes, "items": items})
        return
    if moves:
        rows = [[one.name, one.to, f"{one.bytes / 1e6:.1f}", one.why] for one in moves]
        print_table(["what", "to", "size, MB", "why"], rows)
    done = "moved" if yes else "can be moved: run again with `--yes`"
    progress.print(f"{len(moves)} files, {sum(one.bytes for one in moves) / 1e6:.1f} MB, {done}")


class _Common(TypedDict):
    """The arguments that every command of this module passes to the registry."""

    tracking_uri: str
    trusted_keys: Trust
    key: SigningKey | None
    progress: Progress


def _common() -> _Common:
    from pipeline.trust import signing_key_if_any, trust_of

    settings = Settings.read()
    return _Common(
        tracking_uri=settings.tracking_uri,
        trusted_keys=trust_of(settings),
        key=signing_key_if_any(settings),
        progress=say,
    )


def _report(moved: Moved, what: str, *, as_json: bool) -> None:
    from pipeline.publishing.promotion_file import follow_promotion

    pushed = follow_promotion(moved.name, Settings.read(), say)
    if as_json:
        print_json(json.loads(json.dumps({**asdict(moved), "git": None if pushed is None else asdict(pushed)})))
        return
    before = f"; it was version {moved.replaced} before" if moved.replaced else ""
    note = (
        " (nothing to do)" if moved.entry is None else " (finished what an earlier command had begun)" * moved.finished
    )
    results.print(escape(f"{moved.name}: {what}{before}{note}"))


def _what(entry: JournalEntry) -> str:
    """The aliases that an act moved, or the commit that it pushed."""
    if entry.pushed is not None:
        return f"{entry.pushed.path}: commit {entry.pushed.commit[:12]}"
    return ", ".join(f"{move.alias} {move.before or '-'} > {move.after or '-'}" for move in entry.moves)
