"""Moving aliases: promote a registered version, roll back, and set a canary.

Every command that moves an alias is here or in `registry.promote`. Each takes the promotion lock
(`registry.promotion_lock`), finishes what a killed one had begun (`registry.journal`), verifies the stored version
again, and only then moves the alias.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from registry import journal
from registry.backend import Line, RegistryBackend, Version, only_version
from registry.catalog import current, names
from registry.connect import open_backend
from registry.errors import PromotionError, PullError, VerificationError
from registry.journal import Action, JournalEntry, JournalRecord, Target
from registry.policy import Policy, Trust, policy_of
from registry.progress import Progress, silent
from registry.promotion_lock import PromotionLock, hold_promotion_lock
from registry.resolve import CANARY, CHAMPION, PREVIOUS, Resolution, audited_move, check, resolve_alias
from registry.signing import PublicKey, SigningKey
from registry.stored import verify_stored
from registry.suggestions import suggestion


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
    progress: Progress = silent,
) -> Moved:
    """Make a registered version champion; ``previous`` then names the old one. If it was the canary, that ends.

    Where it is champion already, and the audit trail does not say so, an entry is written that does: something else
    than Slipway moved the alias, or nobody signed for it (which counts where there is a ``key``). Where the trail is
    broken (`registry.journal.chain_break`) it begins anew with this entry, and there is no ``previous``.

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
    policy = policy_of(trusted_keys, required_gates)
    with opened(name, tracking_uri, policy, progress) as (held, backend, line, _):
        chosen = only_version(backend, name, version)
        damage = journal.chain_break(journal.records(line), signers(policy, key))
        if damage is None:
            _check_against_trail(line, chosen, Resolution(version, pinned=True), policy)
        digest = _verified(chosen, tracking_uri, policy, progress)
        if damage is not None:
            progress(f"warning: {damage}: the trail begins anew, and version {version} is {digest} from now on")
        entry = assign_champion(
            held, backend, line, chosen, digest,
            action="promote", why=why, who=who, key=key, policy=policy, anew=damage is not None,
        )  # fmt: skip
        return _result(tracking_uri, name, "promote", version, digest, entry)


def rollback(
    name: str,
    tracking_uri: str,
    trusted_keys: Trust,
    *,
    required_gates: Sequence[str] | None = None,
    why: str = "by hand",
    who: str | None = None,
    key: SigningKey | None = None,
    progress: Progress = silent,
) -> Moved:
    """Swap ``champion`` and ``previous`` after verifying the new champion; doing it twice changes nothing.

    A killed rollback is finished, not repeated. Arguments are those of `promote_version`.

    Raises:
        PromotionError: The line has no ``previous``.
        RegistryError: As `promote_version`.
    """
    policy = policy_of(trusted_keys, required_gates)
    with opened(name, tracking_uri, policy, progress) as (held, backend, line, finished):
        if finished is not None and finished.action == "rollback":
            return _result(tracking_uri, name, "rollback", finished.version, finished.digest, finished, finished=True)
        if PREVIOUS not in line.aliases:
            raise PromotionError(f"`{name}` has no alias `{PREVIOUS}`: no earlier champion to roll back to")
        meant = _resolved(line, PREVIOUS, policy)
        chosen = only_version(backend, name, meant.version or "")
        _check_against_trail(line, chosen, meant, policy)
        digest = _verified(chosen, tracking_uri, policy, progress)
        entry = assign_champion(
            held, backend, line, chosen, digest, action="rollback", why=why, who=who, key=key, policy=policy
        )
        return _result(tracking_uri, name, "rollback", chosen.version, digest, entry)


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
    progress: Progress = silent,
) -> Moved:
    """Send ``weight`` percent of the traffic to this version and the rest to the champion; 0 ends the canary.

    The alias ``canary`` names the version, so that it can be pulled; `registry.resolve.traffic` reads the split. Other
    arguments are those of `promote_version`.

    Raises:
        PromotionError: ``weight`` is not in 0 to 100, the version is champion, or with 0 it is not the canary.
        RegistryError: As `promote_version`.
    """
    if not 0 <= weight <= 100:
        raise PromotionError(f"the weight {weight} is not a percentage: expected 0 to 100")
    policy = policy_of(trusted_keys, required_gates)
    with opened(name, tracking_uri, policy, progress) as (held, backend, line, _):
        chosen = only_version(backend, name, version)
        if weight and line.aliases.get(CHAMPION) == version:
            raise PromotionError(f"version {version} of `{name}` is champion and can't also be its canary")
        if not weight and line.aliases.get(CANARY) != version:
            raise PromotionError(f"version {version} of `{name}` is not the canary")
        digest = chosen.manifest_digest or ""
        if weight:
            _check_against_trail(line, chosen, Resolution(version, pinned=True), policy)
            digest = _verified(chosen, tracking_uri, policy, progress)
        moves = {CANARY: Target(version, digest) if weight else None}
        entry = journal.record_and_move(
            held, backend, line,
            action="canary", version=version, digest=digest, moves=moves, weight=weight, who=who, why=why, key=key,
            trusted=signers(policy, key),
        )  # fmt: skip
        return _result(tracking_uri, name, "canary", version, digest, entry)


def assign_champion(
    held: PromotionLock,
    backend: RegistryBackend,
    line: Line,
    chosen: Version,
    digest: str,
    *,
    action: Action,
    why: str,
    who: str | None,
    key: SigningKey | None,
    policy: Policy,
    also: Sequence[str] = (),
    champion: bool = True,
    anew: bool = False,
) -> JournalEntry | None:
    """Point the champion (if ``champion``) and the aliases ``also`` at a verified version; None if they already are.

    A promotion moves ``previous`` to the replaced version first, so that a rollback is possible at every moment; a
    rollback moves the champion first. The replaced version is the one in the audit trail, not the one that the alias
    names. If the trail begins ``anew``, the replaced version is unknown, and ``previous`` is removed.
    """
    number, known = chosen.version, signers(policy, key) if key is not None else ()
    target = Target(number, digest)
    moves: dict[str, Target | None] = {
        alias: target for alias in also if anew or not journal.is_confirmed(line, alias, number, known)
    }
    before = line.aliases.get(CHAMPION)
    if champion and before == number and (anew or not journal.is_confirmed(line, CHAMPION, number, known)):
        moves[CHAMPION] = target
    if champion and before != number:
        moved: dict[str, Target | None] = {CHAMPION: target}
        replaced = None if anew else _replaced(backend, line, policy)
        if replaced is not None and replaced.version != number:
            former: dict[str, Target | None] = {PREVIOUS: replaced}
            moved = moved | former if action == "rollback" else former | moved
        moves |= moved
        if line.aliases.get(CANARY) == number:
            moves[CANARY] = None
    if anew:
        moves |= {alias: None for alias in (PREVIOUS, CANARY) if alias in line.aliases and alias not in moves}
    if not moves:
        return None
    return journal.record_and_move(
        held, backend, line, action=action, version=number, digest=digest, moves=moves, who=who, why=why, key=key,
        trusted=signers(policy, key), anew=anew,
    )  # fmt: skip


def _replaced(backend: RegistryBackend, line: Line, policy: Policy) -> Target | None:
    """Return the champion according to the audit trail, or to the alias if the trail has no entry for it."""
    found, lacking = audited_move(journal.records(line), CHAMPION, policy)
    if lacking:
        return None
    if found is not None:
        number = next(move.after for move in found[0].moves if move.alias == CHAMPION)
        return None if number is None else Target(number, found[0].digests().get(number))
    number = line.aliases.get(CHAMPION)
    return None if number is None else Target(number, only_version(backend, line.name, number).manifest_digest)


def signers(policy: Policy, key: SigningKey | None) -> tuple[PublicKey, ...]:
    """Return the keys whose signatures on the audit trail count: the policy's, and ``key`` itself."""
    return policy.keys if key is None else (*policy.keys, key.public)


def recover(
    held: PromotionLock, backend: RegistryBackend, name: str, tracking_uri: str, policy: Policy, progress: Progress
) -> JournalEntry | None:
    """Finish the move that a killed process had begun, if there is one, and return it.

    Everyone who can write to MLflow can write such an entry. So it is abandoned if a version that it moves an alias to
    is not what was signed, or does not fulfil the policy.
    """
    line = backend.line(name)
    begun = journal.pending(journal.records(line)) if line is not None else None
    if line is None or begun is None:
        return None
    entry = begun.entry
    what = f"the {entry.action} of version {entry.version} that {entry.who} began at {entry.when}"
    unfit = _why_not_finished(backend, line, begun, tracking_uri, policy)
    if unfit is not None:
        progress(f"abandoning {what}: {unfit}")
        journal.abandon(held, backend, begun)
        return None
    progress(f"finishing {what}")
    return entry if journal.finish(held, backend, line, begun).state == "done" else None


def _why_not_finished(
    backend: RegistryBackend, line: Line, begun: JournalRecord, tracking_uri: str, policy: Policy
) -> str | None:
    """Say why a begun move may not be finished, or None. A rollback verifies `previous` itself."""
    if policy.signed_moves and begun.signed_by(policy.keys) is None:
        return "no trusted key signed it"
    left = [move for move in begun.entry.moves if line.aliases.get(move.alias) != move.after]
    moving = {move.after for move in left if move.alias != PREVIOUS}
    said = begun.entry.digests()
    for version in backend.versions(line.name):
        if version.version in moving:
            if said.get(version.version, version.manifest_digest) != version.manifest_digest:
                return f"version {version.version} is another release than the entry says"
            try:
                verify_stored(version, tracking_uri, policy)
            except (VerificationError, PullError) as error:
                return str(error)
    return None


@contextmanager
def opened(
    name: str, tracking_uri: str, policy: Policy, progress: Progress
) -> Iterator[tuple[PromotionLock, RegistryBackend, Line, JournalEntry | None]]:
    """Give the lock, the backend, the line after recovery, and the entry that recovery finished, if any."""
    if not current(tracking_uri, name):
        raise PromotionError(f"there is no release `{name}`{suggestion(name, names(tracking_uri))}")
    with hold_promotion_lock(tracking_uri, name, progress) as held, open_backend(tracking_uri) as backend:
        finished = recover(held, backend, name, tracking_uri, policy, progress)
        line = backend.line(name)
        if line is None:
            raise PromotionError(f"`{name}` was removed during the promotion")
        yield held, backend, line, finished


def _verified(chosen: Version, tracking_uri: str, policy: Policy, progress: Progress) -> str:
    progress(f"verifying the stored files of {chosen.name} version {chosen.version}")
    try:
        return verify_stored(chosen, tracking_uri, policy).digest
    except (VerificationError, PullError) as error:
        raise PromotionError(f"version {chosen.version} of `{chosen.name}` was not promoted: {error}") from error


def _resolved(line: Line, alias: str, policy: Policy) -> Resolution:
    try:
        return resolve_alias(line, alias, policy)
    except PullError as error:
        raise PromotionError(str(error)) from error


def _check_against_trail(line: Line, chosen: Version, meant: Resolution, policy: Policy) -> None:
    try:
        check(line, chosen, meant, policy)
    except PullError as error:
        raise PromotionError(f"version {chosen.version} of `{line.name}` was not promoted: {error}") from error


def _result(
    tracking_uri: str,
    name: str,
    action: Action,
    version: str,
    digest: str,
    entry: JournalEntry | None,
    *,
    finished: bool = False,
) -> Moved:
    aliases = next(found.aliases for found in current(tracking_uri, name) if found.version == version)
    replaced = next((move.before for move in entry.moves if move.alias == CHAMPION), None) if entry else None
    number, weight = (entry.number, entry.weight) if entry else (None, None)
    return Moved(name, action, version, aliases, digest, replaced, number, finished, weight)
