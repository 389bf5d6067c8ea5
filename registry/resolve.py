"""Resolving an alias to a version, for pull, serve, rescan, bundle, rollback, tiering and retention alike.

An MLflow alias is a hint, because everyone who can write to MLflow can set it. The audit trail decides
(`registry.journal`); if the alias disagrees with it, resolving fails. What is read, and what it is worth:

- the alias itself, the version's digest tag and its location: hints, held to the trail and to the signed manifest;
- the trail's entries: signed, where the policy asks for ``signed_moves``;
- the canary's share: of the trail's entry. The tag ``slipway.canary`` is for those who route without Slipway.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from registry import catalog, journal, trails
from registry.backend import Line, Version
from registry.catalog import names
from registry.errors import NotFoundError, PullError
from registry.journal import JournalEntry, JournalRecord
from registry.policy import Policy
from registry.suggestions import suggestion
from registry.tracking import shown

CANDIDATE, CHAMPION, PREVIOUS, CANARY = "candidate", "champion", "previous", "canary"
_ATTEMPTS = 5


class AuditMismatchError(PullError):
    """An alias that does not name what the audit trail says."""


@dataclass(frozen=True)
class Resolution:
    """What an alias means: ``version`` is None where it is to name none.

    ``digest`` is the manifest's, where an entry says it; ``weight`` in percent, where the alias is the canary;
    ``pinned`` where it is no alias but a version's number, of which the trail need not say anything.
    """

    version: str | None
    digest: str | None = None
    weight: int | None = None
    pinned: bool = False


@dataclass(frozen=True)
class Share:
    """A version, and the percentage of the traffic that is for it."""

    version: Version
    weight: int


def resolve_alias(line: Line, alias: str, policy: Policy) -> Resolution:
    """Return what the alias means, as the audit trail says and the alias agrees.

    Where moves must be signed, a begun move does not count: everyone who can write to MLflow could have begun it.

    Raises:
        AuditMismatchError: The trail says something else, or is not whole, or nobody signed it.
    """
    named, trail = line.aliases.get(alias), journal.records(line)
    found, lacking = audited_move(trail, alias, policy)
    if lacking:
        raise _unexplained(line, alias, f"and {lacking}")
    if found is None:
        return Resolution(named)
    entry, begun = found
    move = next(move for move in entry.moves if move.alias == alias)
    if named not in ({move.before, move.after} if begun else {move.after}):
        raise _unexplained(line, alias, f"but the audit trail says {move.after}: it was not moved by Slipway")
    if named != move.after or named is None:
        return Resolution(named)
    return Resolution(named, entry.digests().get(named), entry.weight if alias == CANARY else None)


def _unexplained(line: Line, alias: str, why: str) -> AuditMismatchError:
    return AuditMismatchError(
        f"`{line.name}@{alias}` names version {line.aliases.get(alias)}, {why};"
        f" set the right version with `slipway promote {line.name} --version N`"
    )


def audited_move(
    trail: Sequence[JournalRecord], alias: str, policy: Policy
) -> tuple[tuple[JournalEntry, bool] | None, str]:
    """Return the entry that says what the alias means, whether it was only begun, and what its proof lacks.

    Where moves need not be signed there may be no entry, which is nothing that is lacking.
    """
    damage = journal.chain_break(trail, policy.keys)
    if damage is not None:
        return None, damage
    if policy.signed_moves:
        entry, lacking = journal.last_signed_move(trail, alias, policy.keys)
        return (None, f"{lacking}, which this policy asks for") if entry is None else ((entry, False), "")
    record = journal.last_move(trail, alias)
    return (None if record is None else (record.entry, record.state == "begun")), ""


def resolve(name: str, alias: str, tracking_uri: str, policy: Policy, cache: Path | None = None) -> Version:
    """Return the version that ``alias`` of the release line ``name`` means, or version 3 where it is ``v3``.

    With a ``cache`` an audit trail that is shorter than one seen before, or another one, is refused: it is the
    registry of an earlier day.

    Raises:
        NotFoundError: No such line, alias or version.
        PullError: Slipway did not register the version or move the alias, or the version is
            registered as another release than the trail says.
    """
    line, meant = _agreed(name, alias, tracking_uri, policy)
    if cache is not None:
        trails.remember(cache, tracking_uri, line, policy)
    return _version(line, meant, tracking_uri, policy)


def traffic(name: str, alias: str, tracking_uri: str, policy: Policy) -> list[Share]:
    """Return the versions that the traffic of ``alias`` is for: beside a champion its canary, if there is one.

    Raises:
        NotFoundError, PullError, TrackingError: As `resolve`, for either of the two.
    """
    chosen = resolve(name, alias, tracking_uri, policy)
    line = catalog.line(tracking_uri, name) if alias == CHAMPION else None
    if line is None or CANARY not in journal.last_moves(journal.records(line)):
        return [Share(chosen, 100)]
    line, meant = _agreed(name, CANARY, tracking_uri, policy, absent=True)
    if meant.version is None or not meant.weight or meant.version == chosen.version:
        return [Share(chosen, 100)]
    canary = _version(line, meant, tracking_uri, policy)
    return [Share(chosen, 100 - meant.weight), Share(canary, meant.weight)]


def referenced_versions(line: Line) -> set[str]:
    """Return the numbers of the versions that an alias names or should name, or that a begun move is about.

    So a moved alias, or an entry marked as abandoned, can't cause the removal of a release that the trail names.
    """
    trail = journal.records(line)
    begun = journal.pending(trail)
    moves = list(begun.entry.moves) if begun is not None else []
    movers = journal.last_moves(trail)
    last = [*movers.values(), *filter(None, (journal.last_move(trail, alias) for alias in movers))]
    said = {move.after for record in last for move in record.entry.moves}
    return {
        number for number in (*line.aliases.values(), *said, *(n for m in moves for n in (m.before, m.after))) if number
    }


def _agreed(
    name: str, alias: str, tracking_uri: str, policy: Policy, *, absent: bool = False
) -> tuple[Line, Resolution]:
    """Return the line, and what is meant, once alias and audit trail agree."""
    pinned = alias.removeprefix("v") if is_pin(alias) else None
    for attempt in range(1, _ATTEMPTS + 1):
        line = catalog.line(tracking_uri, name)
        if line is None:
            raise NotFoundError(f"no release `{name}` in {shown(tracking_uri)}{suggestion(name, names(tracking_uri))}")
        if pinned is not None:
            return line, Resolution(pinned, pinned=True)
        if alias not in line.aliases and not absent:
            raise NotFoundError(f"`{name}` has no alias `{alias}`{suggestion(alias, sorted(line.aliases))}")
        try:
            return line, resolve_alias(line, alias, policy)
        except AuditMismatchError:
            if attempt == _ATTEMPTS:
                raise
        # A server reads aliases and tags one after the other, so a promotion just then shows half: look again.
        time.sleep(0.05 * 2**attempt)
    raise AssertionError("unreachable: the last attempt returns or raises")


def is_pin(alias: str) -> bool:
    """Whether it names a version by its number, as ``v3`` does."""
    number = alias.removeprefix("v")
    return alias != number and number.isascii() and number.isdecimal() and not number.startswith("0")


def _version(line: Line, meant: Resolution, tracking_uri: str, policy: Policy) -> Version:
    number = meant.version or ""
    found = catalog.version(tracking_uri, line.name, number)
    if found is None:
        raise NotFoundError(f"`{line.name}` has no version {number}")
    check(line, found, meant, policy)
    return found


def check(line: Line, version: Version, meant: Resolution, policy: Policy) -> None:
    """Hold the digest that a version is registered with to what the trail says of it.

    Raises:
        PullError: Slipway did not register it, the trail says another digest, or no signed entry covers it.
    """
    number = version.version
    if version.manifest_digest is None:
        raise PullError(f"version {number} of `{line.name}` was not registered by Slipway: it has no signed manifest")
    trail = journal.records(line) if policy.signed_moves else []
    damage = journal.chain_break(trail, policy.keys)
    if damage is not None:
        raise PullError(f"version {number} of `{line.name}` can't be checked against the audit trail: {damage}")
    signed = [record.entry for record in trail if record.signed_by(policy.keys) is not None]
    said = {entry.digests()[number] for entry in signed if number in entry.digests()}
    said |= {meant.digest} if meant.digest else set()
    if policy.signed_moves and not said and not meant.pinned:
        raise PullError(f"no signed entry of the audit trail of `{line.name}` says which release version {number} is")
    others = sorted(said - {version.manifest_digest})
    if others:
        source = "a signed entry of the audit trail" if policy.signed_moves else "the audit trail"
        raise PullError(
            f"version {number} of `{line.name}` is registered as {version.manifest_digest}, and {source} says"
            f" {others[0]}: the version was replaced"
        )
