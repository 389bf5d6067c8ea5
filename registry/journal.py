"""The audit trail of a release line: who moved which alias, when, from what, to what, and why.

Each entry is one tag of the registered model, ``slipway.journal.000042``, numbered without a gap under the promotion
lock (`registry.promotion_lock`). It is written *before* the first alias moves, with ``state`` ``begun``, and again as
``done`` after the last one. So an entry of a killed process is there to read, and the next process finishes it first:
its versions were verified before it was written.

Law: for each alias, the last entry that moves it says where it points. Where it points elsewhere, something that is not
Slipway moved it, and `registry.pull` refuses it. An entry may be signed; then it holds for those who trust the key,
whoever can write to MLflow. The signature is over the entry and not over its ``state``, which whoever can write to
MLflow can set: where moves must be signed no state is believed (`last_signed_move`).

Chain: an entry holds in ``prior`` the running digest of all entries before it, and for each alias that it moves the
digest of the manifest that the version was registered with. So a signature covers the whole trail before it and
for the release behind each number: `chain_break` says where entries were removed, altered or put in between. An entry
whose ``prior`` is `START` begins the trail: the first one, or the one with which `slipway promote` begins anew a trail
that was broken. Entries of the first format have neither; they keep their signed bytes, and are covered by the
``prior`` of the first entry that has one.
"""

from __future__ import annotations

import base64
import os
import pwd
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from registry.backend import Line, RegistryBackend
from registry.digests import canonical_json, digest_of
from registry.errors import PromotionError, SigningError, TrackingError
from registry.manifest import Digest
from registry.promotion_lock import PromotionLock
from registry.signing import PublicKey, Signature, SigningKey, verify_signature

PREFIX = "slipway.journal."
PAYLOAD_TYPE = "application/vnd.slipway.journal.v1+json"
WEIGHT_TAG = "slipway.canary"
START = digest_of(b"")
"""The ``prior`` of an entry with which a trail begins."""
Text = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Commit = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40,64}$")]
Action = Literal["promote", "rollback", "canary", "git"]
State = Literal["begun", "done", "abandoned"]


class Target(NamedTuple):
    """A version that an alias is to name: its number, and the digest of its manifest; None if unknown."""

    version: str
    digest: str | None


class AliasMove(BaseModel):
    """One alias: the version it named, and the one it names now; None is none. ``digest`` is that of ``after``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    alias: str
    before: str | None
    after: str | None
    digest: Digest | None = None


class PushedFile(BaseModel):
    """A file in a Git repository that names the champion, and the commit by which it does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repository: Text
    branch: Text
    path: Text
    commit: Commit


class JournalEntry(BaseModel):
    """One act. ``when`` is UTC with milliseconds; ``moves`` are in the order in which they are made.

    ``digest`` is the manifest's digest of the version that the act is about; ``weight`` the canary's, in percent;
    ``prior`` the running digest of the trail before, None in entries of the first format. ``pushed`` is the file that
    ``git`` wrote.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    line: str
    action: Action
    version: str
    digest: str
    moves: tuple[AliasMove, ...]
    weight: Annotated[int, Field(ge=0, le=100)] | None = None
    who: str
    when: str
    why: str
    prior: Digest | None = None
    pushed: PushedFile | None = None

    @model_validator(mode="after")
    def _digests_are_signed(self) -> Self:
        if self.prior is None and any(move.digest is not None for move in self.moves):
            raise ValueError("an entry of the first format has no digests of moves: they would not be signed")
        return self

    def payload(self) -> bytes:
        """Return the bytes that are signed; of an entry of an earlier format those that it was signed with."""
        document = self.model_dump(mode="json")
        if self.pushed is None:
            del document["pushed"]
        if self.prior is None:
            del document["prior"]
            for move in document["moves"]:
                del move["digest"]
        return canonical_json(document)

    def digests(self) -> dict[str, str]:
        """Return what the entry says of versions: number → digest of the manifest."""
        said = {move.after: move.digest for move in self.moves if move.after is not None and move.digest is not None}
        return {**said, self.version: self.digest}


class JournalRecord(BaseModel):
    """What the tag holds: an entry, how far it got, and a signature over the entry, base64 of a DSSE envelope."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: State
    entry: JournalEntry
    signature: str | None = None

    def signed_by(self, trusted: Sequence[PublicKey]) -> str | None:
        """Return the trusted key's id, None where it is not signed by one."""
        if self.signature is None:
            return None
        try:
            envelope = Signature.parse(base64.b64decode(self.signature))
            return verify_signature(envelope, self.entry.payload(), trusted, kind=PAYLOAD_TYPE)
        except (SigningError, ValueError):
            return None


def records(line: Line) -> list[JournalRecord]:
    """Return the line's journal, in order.

    Raises:
        TrackingError: An entry can't be read, or says another number or line than its tag.
    """
    found = []
    for key in (key for key in line.tags if key.startswith(PREFIX)):
        try:
            record = JournalRecord.model_validate_json(line.tags[key])
        except ValidationError as error:
            raise TrackingError(f"the audit trail of `{line.name}` is damaged at `{key}`") from error
        if key != _key(record.entry.number) or record.entry.line != line.name:
            raise TrackingError(f"the audit trail of `{line.name}` was altered at `{key}`: its entry is another's")
        found.append(record)
    return sorted(found, key=lambda record: record.entry.number)


def last_move(journal: Sequence[JournalRecord], alias: str) -> JournalRecord | None:
    """Return the last record that moves the alias; None where none does."""
    for record in reversed(journal):
        if record.state != "abandoned" and _moves(record, alias):
            return record
    return None


def last_moves(journal: Sequence[JournalRecord]) -> dict[str, JournalRecord]:
    """Return the last record that moves each alias, of any ``state``: everyone may have set that."""
    return {move.alias: record for record in journal for move in record.entry.moves}


def last_signed_move(
    journal: Sequence[JournalRecord], alias: str, trusted: Sequence[PublicKey]
) -> tuple[JournalEntry | None, str]:
    """Return the last entry that moves the alias, held to signatures alone; else None, and what it lacks.

    An act that was begun or abandoned counts as one that is done, so that no state that was set brings back what was
    before. From that entry to the end none may be missing or unsigned: one that was taken out, or put in the place of
    another, may have moved the alias too.
    """
    at = next((i for i in reversed(range(len(journal))) if _moves(journal[i], alias)), None)
    if at is None:
        return None, "no entry of the audit trail says so"
    first = journal[at].entry.number
    for number, record in enumerate(journal[at:], first):
        if record.entry.number != number:
            return None, f"entry {number} of the audit trail is missing"
        if record.signed_by(trusted) is None:
            return None, f"no trusted key signed entry {number} of the audit trail"
    return journal[at].entry, ""


def chain_break(journal: Sequence[JournalRecord], trusted: Sequence[PublicKey]) -> str | None:
    """Say where the trail is not the one that its signed entries were written onto; None where it is.

    Entries after the last signed one are not covered by a signature; `last_signed_move` judges them.
    """
    whole = _since_beginning(journal, trusted)
    signed_flags = [record.signed_by(trusted) is not None for record in whole]
    digest, chained = START, False
    begins = whole[0].entry.number if signed_flags and signed_flags[0] and whole[0].entry.prior == START else 1
    for number, (record, signed) in enumerate(zip(whole, signed_flags, strict=True), begins):
        if not any(signed_flags[number - begins :]):
            return None
        entry = record.entry
        if entry.number != number:
            return f"entry {number} of the audit trail is missing"
        if signed and entry.prior is None and chained:
            return f"entry {number} of the audit trail is of an older format than one before it"
        if signed and entry.prior not in (None, digest):
            return f"the audit trail before entry {number} is not the one that it was written onto"
        chained = chained or (signed and entry.prior is not None)
        digest = _running(digest, entry)
    return None


def trail_digest(journal: Sequence[JournalRecord], trusted: Sequence[PublicKey]) -> str:
    """Return the running digest of the trail, which the next entry has as its ``prior``."""
    digest = START
    for record in _since_beginning(journal, trusted):
        digest = _running(digest, record.entry)
    return digest


def _since_beginning(journal: Sequence[JournalRecord], trusted: Sequence[PublicKey]) -> Sequence[JournalRecord]:
    """Cut off what is before the last entry that begins a trail; an unsigned entry begins none."""
    for at in reversed(range(len(journal))):
        if journal[at].entry.prior == START and journal[at].signed_by(trusted) is not None:
            return journal[at:]
    return journal


def is_confirmed(line: Line, alias: str, version: str, signers: Sequence[PublicKey]) -> bool:
    """Whether the alias names the version, as the audit trail says; by an entry of ``signers``, if any are given."""
    if line.aliases.get(alias) != version:
        return False
    if signers:
        entry, _ = last_signed_move(records(line), alias, signers)
    else:
        record = last_move(records(line), alias)
        entry = record.entry if record is not None and record.state == "done" else None
    return entry is not None and any((move.alias, move.after) == (alias, version) for move in entry.moves)


def pending(journal: Sequence[JournalRecord]) -> JournalRecord | None:
    """Return the unfinished move, if there is one; it can only be the last record."""
    return journal[-1] if journal and journal[-1].state == "begun" else None


def record_and_move(
    lock: PromotionLock,
    backend: RegistryBackend,
    line: Line,
    *,
    action: Action,
    version: str,
    digest: str,
    moves: Mapping[str, Target | None],
    weight: int | None = None,
    pushed: PushedFile | None = None,
    who: str | None,
    why: str,
    key: SigningKey | None,
    trusted: Sequence[PublicKey],
    anew: bool = False,
) -> JournalEntry:
    """Write the entry as begun, move the aliases, and write it as done; ``line`` is the current state.

    ``trusted`` signed the trail before it. ``anew`` begins the trail anew with this entry, where that is `chain_break`.

    Raises:
        PromotionError: The trail is broken, and is not to begin anew; nothing was written.
    """
    journal = records(line)
    damage = chain_break(journal, trusted)
    if damage is not None and not anew:
        raise PromotionError(
            f"no alias of `{line.name}` was moved: {damage}. Restore the tags `{PREFIX}*` of the registered model from"
            f" a backup, or begin the trail anew with `slipway promote {line.name} --version N`, where N is a release"
            " whose digest you know"
        )
    entry = JournalEntry(
        number=journal[-1].entry.number + 1 if journal else 1,
        line=line.name,
        action=action,
        version=version,
        digest=digest,
        moves=tuple(
            AliasMove(
                alias=alias,
                before=line.aliases.get(alias),
                after=target.version if target else None,
                digest=target.digest if target else None,
            )
            for alias, target in moves.items()
        ),
        weight=weight,
        who=who or current_user(),
        when=datetime.now(UTC).isoformat(timespec="milliseconds"),
        why=why,
        prior=START if damage is not None else trail_digest(journal, trusted),
        pushed=pushed,
    )
    signature = None
    if key is not None:
        signature = base64.b64encode(key.sign(entry.payload(), kind=PAYLOAD_TYPE).to_bytes()).decode()
    begun = JournalRecord(state="begun", entry=entry, signature=signature)
    lock.check()
    _write(backend, begun)
    finish(lock, backend, line, begun)
    return entry


def finish(lock: PromotionLock, backend: RegistryBackend, line: Line, record: JournalRecord) -> JournalRecord:
    """Make every move of a begun entry again; abandon the entry if a version of it no longer exists."""
    entry = record.entry
    there = {version.version for version in backend.versions(entry.line)}
    whole = all(move.after is None or move.after in there for move in entry.moves)
    for move in entry.moves if whole else ():
        lock.check()
        if move.after is not None:
            backend.set_alias(entry.line, move.alias, move.after)
        elif move.alias in line.aliases:
            backend.delete_alias(entry.line, move.alias)
    if whole and any(move.alias == "canary" for move in entry.moves):
        split = {"version": entry.version, "weight": entry.weight} if entry.weight else {}
        backend.set_line_tag(entry.line, WEIGHT_TAG, canonical_json(split).decode())
    return _end(lock, backend, record, "done" if whole else "abandoned")


def abandon(lock: PromotionLock, backend: RegistryBackend, record: JournalRecord) -> None:
    """Mark a begun entry as abandoned; the aliases stay as they are."""
    _end(lock, backend, record, "abandoned")


def current_user() -> str:
    """Return ``USER@MACHINE`` of this process."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _end(lock: PromotionLock, backend: RegistryBackend, record: JournalRecord, state: State) -> JournalRecord:
    ended = record.model_copy(update={"state": state})
    lock.check()
    _write(backend, ended)
    return ended


def _running(digest: str, entry: JournalEntry) -> str:
    return digest_of(digest.encode() + entry.payload())


def _moves(record: JournalRecord, alias: str) -> bool:
    return any(move.alias == alias for move in record.entry.moves)


def _write(backend: RegistryBackend, record: JournalRecord) -> None:
    # An older Slipway refuses an entry with a key that it does not know, even for a pull.
    without = {"entry": {"pushed"}} if record.entry.pushed is None else None
    backend.set_line_tag(record.entry.line, _key(record.entry.number), record.model_dump_json(exclude=without))


def _key(number: int) -> str:
    return f"{PREFIX}{number:06}"
