"""Moving aliases: a version becomes champion, a canary, or the champion gives way to the one before.

Every command that moves an alias is here or in `registry.promote`, takes its turn (`registry.turns`), finishes what a
killed one had begun (`registry.journal`), verifies the stored version anew, and only then moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from registry import journal
from registry.backend import Backend, Line, Version, only_version, open_backend
from registry.catalog import current, names, nearest
from registry.errors import PromotionError, RegistryError
from registry.journal import Action, Entry
from registry.policy import Trust
from registry.signing import SigningKey
from registry.stored import verify_stored
from registry.turns import Turn, turn

CANDIDATE, CHAMPION, PREVIOUS, CANARY = "candidate", "champion", "previous", "canary"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Moved:
    """What was done. ``replaced`` is the champion before; ``entry`` its number in the journal, None if nothing moved.

    ``finished`` says that this act had been begun before, by a process that died, and was now finished.
    """

    name: str
    action: Action
    version: str
    aliases: tuple[str, ...]
    manifest_digest: str
    replaced: str | None
    entry: int | None
    finished: bool = False
    weight: int | None = None


def promote_version(
    name: str,
    version: str,
    tracking_uri: str,
    trusted_keys: Trust,
    *,
    required_gates: Sequence[str] | None = None,
    why: str = "by hand",
    who: str | None = None,
    key: SigningKey | None = None,
    progress: Progress = lambda _: None,
) -> Moved:
    """Make a registered version champion; ``previous`` names the champion before. The canary, if it is this, ends.

    Args:
        name: The release line, as ``demo-awq``.
        version: The version's number.
        tracking_uri: Where MLflow is.
        trusted_keys: The keys whose signatures count, or a policy.
        required_gates: The gates that must be there and let through; the policy's where not given.
        why: What the audit trail says.
        who: Who the audit trail names; ``USER@MACHINE`` where it is not given.
        key: What the journal's entry is signed with, if anything.
        progress: Told what is being done.

    Raises:
        PromotionError: The stored version is not what was signed, a gate blocks or is absent; no alias moved.
        TrackingError: There is no such version, or MLflow can't be reached, or refused.
    """
    with _opened(name, tracking_uri, progress) as (held, backend, line, _):
        chosen = only_version(backend, name, version)
        digest = _verified(chosen, tracking_uri, trusted_keys, required_gates, progress)
        entry = appoint(held, backend, line, chosen, digest, action="promote", why=why, who=who, key=key)
        return _told(tracking_uri, name, "promote", version, digest, entry)


def rollback(
    name: str,
    tracking_uri: str,
    trusted_keys: Trust,
    *,
    required_gates: Sequence[str] | None = None,
    why: str = "by hand",
    who: str | None = None,
    key: SigningKey | None = None,
    progress: Progress = lambda _: None,
) -> Moved:
    """Swap ``champion`` and ``previous``, the version that becomes champion verified anew. Twice, and all is as before.

    A rollback that was killed is finished, not done a second time. Arguments and errors are those of `promote_version`;
    a line without ``previous`` is a ``PromotionError``.
    """
    with _opened(name, tracking_uri, progress) as (held, backend, line, finished):
        if finished is not None and finished.action == "rollback":
            return _told(tracking_uri, name, "rollback", finished.version, finished.digest, finished, finished=True)
        if PREVIOUS not in line.aliases:
            raise PromotionError(f"`{name}` has no version `{PREVIOUS}`: there is nothing to go back to")
        chosen = only_version(backend, name, line.aliases[PREVIOUS])
        digest = _verified(chosen, tracking_uri, trusted_keys, required_gates, progress)
        entry = appoint(held, backend, line, chosen, digest, action="rollback", why=why, who=who, key=key)
        return _told(tracking_uri, name, "rollback", chosen.version, digest, entry)


def canary(
    name: str,
    version: str,
    weight: int,
    tracking_uri: str,
    trusted_keys: Trust,
    *,
    required_gates: Sequence[str] | None = None,
    why: str = "by hand",
    who: str | None = None,
    key: SigningKey | None = None,
    progress: Progress = lambda _: None,
) -> Moved:
    """Record that ``weight`` percent of the traffic is for this version, and the rest for the champion; 0 ends it.

    ``canary`` names the version, so that it can be pulled; `traffic` reads the split. Other arguments and errors are
    those of `promote_version`.
    """
    if not 0 <= weight <= 100:
        raise PromotionError(f"a weight of {weight} is no share of the traffic: give 0 to 100 percent")
    with _opened(name, tracking_uri, progress) as (held, backend, line, _):
        chosen = only_version(backend, name, version)
        if weight and line.aliases.get(CHAMPION) == version:
            raise PromotionError(f"version {version} of `{name}` is champion: it gets all the traffic that is left")
        if not weight and line.aliases.get(CANARY) != version:
            raise PromotionError(f"version {version} of `{name}` is no canary")
        digest = chosen.manifest_digest or ""
        if weight:
            digest = _verified(chosen, tracking_uri, trusted_keys, required_gates, progress)
        moves = {CANARY: version if weight else None}
        entry = journal.act(
            held, backend, line,
            action="canary", version=version, digest=digest, moves=moves, weight=weight, who=who, why=why, key=key,
        )  # fmt: skip
        return _told(tracking_uri, name, "canary", version, digest, entry)


def appoint(
    held: Turn,
    backend: Backend,
    line: Line,
    chosen: Version,
    digest: str,
    *,
    action: Action,
    why: str,
    who: str | None,
    key: SigningKey | None,
    also: Sequence[str] = (),
    champion: bool = True,
) -> Entry | None:
    """Let ``champion``, and the aliases ``also``, name a verified version; None where they do.

    Where a version is promoted, the one that it replaces becomes ``previous`` first, so that there is a way back at
    every moment; in a rollback the champion moves first, since that is what it is for.
    """
    before, number = line.aliases.get(CHAMPION), chosen.version
    moves: dict[str, str | None] = {alias: number for alias in also if line.aliases.get(alias) != number}
    if champion and before != number:
        appointed: dict[str, str | None] = {CHAMPION: number}
        if before is not None:
            former: dict[str, str | None] = {PREVIOUS: before}
            appointed = appointed | former if action == "rollback" else former | appointed
        moves |= appointed
        if line.aliases.get(CANARY) == number:
            moves[CANARY] = None
    if not moves:
        return None
    return journal.act(
        held, backend, line, action=action, version=number, digest=digest, moves=moves, who=who, why=why, key=key
    )


def recover(held: Turn, backend: Backend, name: str, progress: Progress) -> Entry | None:
    """Finish the act that a killed process had begun, if there is one, and return it."""
    line = backend.line(name)
    begun = journal.pending(journal.records(line)) if line is not None else None
    if line is None or begun is None:
        return None
    entry = begun.entry
    progress(f"finishing the {entry.action} of version {entry.version} that {entry.who} began at {entry.when}")
    return entry if journal.finish(held, backend, line, begun).state == "done" else None


@contextmanager
def _opened(name: str, tracking_uri: str, progress: Progress) -> Iterator[tuple[Turn, Backend, Line, Entry | None]]:
    """Give the turn, the store, the line as it is once everything is finished, and what was finished."""
    if not current(tracking_uri, name):
        raise PromotionError(f"there is no release `{name}`{nearest(name, names(tracking_uri))}")
    with turn(tracking_uri, name, progress) as held, open_backend(tracking_uri) as backend:
        finished = recover(held, backend, name, progress)
        line = backend.line(name)
        if line is None:
            raise PromotionError(f"`{name}` was removed meanwhile")
        yield held, backend, line, finished


def _verified(
    chosen: Version, tracking_uri: str, trusted: Trust, gates: Sequence[str] | None, progress: Progress
) -> str:
    progress(f"verifying what is stored of {chosen.name} version {chosen.version}")
    try:
        return verify_stored(chosen, tracking_uri, trusted, required_gates=gates).digest
    except PromotionError:
        raise
    except RegistryError as error:
        raise PromotionError(f"version {chosen.version} of `{chosen.name}` stays where it is: {error}") from error


def _told(
    tracking_uri: str,
    name: str,
    action: Action,
    version: str,
    digest: str,
    entry: Entry | None,
    *,
    finished: bool = False,
) -> Moved:
    aliases = next(found.aliases for found in current(tracking_uri, name) if found.version == version)
    replaced = next((move.before for move in entry.moves if move.alias == CHAMPION), None) if entry else None
    number, weight = (entry.number, entry.weight) if entry else (None, None)
    return Moved(name, action, version, aliases, digest, replaced, number, finished, weight)
