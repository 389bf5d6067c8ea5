"""The audit trail of a release line: who moved which alias, when, from what, to what, and why.

Each act is one tag of the registered model, ``slipway.journal.000042``, numbered without a gap by whoever has the turn
(`registry.turns`). It is written *before* the first alias moves, with ``state`` ``begun``, and again as ``done`` after
the last one. So an act that was killed halfway is there to read, and whoever comes next finishes it before all else:
its versions were verified before it was written.

Law: for each alias, the last entry that moves it says where it points. Where it points elsewhere, something that is not
Slipway moved it, and `registry.pull` refuses it. An entry may be signed; then it holds for those who trust the key,
whoever can write to MLflow. The signature is over the entry and not over its ``state``, which whoever can write to
MLflow can set: where moves must be signed no state is believed (`proven`).
"""

from __future__ import annotations

import base64
import os
import pwd
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from registry.backend import Backend, Line
from registry.errors import SigningError, TrackingError
from registry.manifest import canonical_json
from registry.signing import PublicKey, Signature, SigningKey, verify_signature
from registry.turns import Turn

PREFIX = "slipway.journal."
PAYLOAD_TYPE = "application/vnd.slipway.journal.v1+json"
WEIGHT_TAG = "slipway.canary"
Action = Literal["promote", "rollback", "canary"]
State = Literal["begun", "done", "abandoned"]


class Move(BaseModel):
    """One alias: the version it named, and the one it names now; None is none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    alias: str
    before: str | None
    after: str | None


class Entry(BaseModel):
    """One act. ``when`` is UTC with milliseconds; ``moves`` are in the order in which they are made.

    ``digest`` is the manifest's digest of the version that the act is about; ``weight`` the canary's, in percent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    line: str
    action: Action
    version: str
    digest: str
    moves: tuple[Move, ...]
    weight: int | None = None
    who: str
    when: str
    why: str

    def payload(self) -> bytes:
        """Return the bytes that are signed."""
        return canonical_json(self.model_dump(mode="json"))


class Record(BaseModel):
    """What the tag holds: an entry, how far it got, and a signature over the entry, base64 of a DSSE envelope."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: State
    entry: Entry
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


def records(line: Line) -> list[Record]:
    """Return the line's journal, in order.

    Raises:
        TrackingError: An entry can't be read, or says another number or line than its tag.
    """
    found = []
    for key in (key for key in line.tags if key.startswith(PREFIX)):
        try:
            record = Record.model_validate_json(line.tags[key])
        except ValidationError as error:
            raise TrackingError(f"the audit trail of `{line.name}` is damaged at `{key}`") from error
        if key != _key(record.entry.number) or record.entry.line != line.name:
            raise TrackingError(f"the audit trail of `{line.name}` was altered at `{key}`: its entry is another's")
        found.append(record)
    return sorted(found, key=lambda record: record.entry.number)


def says(journal: Sequence[Record], alias: str) -> Record | None:
    """Return the last record that moves the alias; None where none does."""
    for record in reversed(journal):
        if record.state != "abandoned" and _moves(record, alias):
            return record
    return None


def proven(journal: Sequence[Record], alias: str, trusted: Sequence[PublicKey]) -> tuple[Entry | None, str]:
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


def confirmed(line: Line, alias: str, version: str, signers: Sequence[PublicKey]) -> bool:
    """Whether the alias names the version, as the audit trail says; by an entry of ``signers``, if any are given."""
    if line.aliases.get(alias) != version:
        return False
    if signers:
        entry, _ = proven(records(line), alias, signers)
    else:
        record = says(records(line), alias)
        entry = record.entry if record is not None and record.state == "done" else None
    return entry is not None and any((move.alias, move.after) == (alias, version) for move in entry.moves)


def pending(journal: Sequence[Record]) -> Record | None:
    """Return the act that was begun and not finished, if there is one: the last, for whoever comes next finishes it."""
    return journal[-1] if journal and journal[-1].state == "begun" else None


def act(
    turn: Turn,
    backend: Backend,
    line: Line,
    *,
    action: Action,
    version: str,
    digest: str,
    moves: Mapping[str, str | None],
    weight: int | None = None,
    who: str | None,
    why: str,
    key: SigningKey | None,
) -> Entry:
    """Write down what is about to be done, do it, and write down that it is done; ``line`` is as it is now."""
    journal = records(line)
    entry = Entry(
        number=journal[-1].entry.number + 1 if journal else 1,
        line=line.name,
        action=action,
        version=version,
        digest=digest,
        moves=tuple(Move(alias=alias, before=line.aliases.get(alias), after=after) for alias, after in moves.items()),
        weight=weight,
        who=who or somebody(),
        when=datetime.now(UTC).isoformat(timespec="milliseconds"),
        why=why,
    )
    signature = None
    if key is not None:
        signature = base64.b64encode(key.sign(entry.payload(), kind=PAYLOAD_TYPE).to_bytes()).decode()
    begun = Record(state="begun", entry=entry, signature=signature)
    turn.check()
    _write(backend, begun)
    finish(turn, backend, line, begun)
    return entry


def finish(turn: Turn, backend: Backend, line: Line, record: Record) -> Record:
    """Make each move of a begun act, whether it was made before or not; abandon one whose version is no more."""
    entry = record.entry
    there = {version.version for version in backend.versions(entry.line)}
    whole = all(move.after is None or move.after in there for move in entry.moves)
    for move in entry.moves if whole else ():
        turn.check()
        if move.after is not None:
            backend.set_alias(entry.line, move.alias, move.after)
        elif move.alias in line.aliases:
            backend.delete_alias(entry.line, move.alias)
    if whole and any(move.alias == "canary" for move in entry.moves):
        split = {"version": entry.version, "weight": entry.weight} if entry.weight else {}
        backend.set_line_tag(entry.line, WEIGHT_TAG, canonical_json(split).decode())
    return _end(turn, backend, record, "done" if whole else "abandoned")


def abandon(turn: Turn, backend: Backend, record: Record) -> None:
    """Write down that a begun act is not to be finished; the aliases stay as they are."""
    _end(turn, backend, record, "abandoned")


def somebody() -> str:
    """Return ``USER@MACHINE`` of this process."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _end(turn: Turn, backend: Backend, record: Record, state: State) -> Record:
    ended = record.model_copy(update={"state": state})
    turn.check()
    _write(backend, ended)
    return ended


def _moves(record: Record, alias: str) -> bool:
    return any(move.alias == alias for move in record.entry.moves)


def _write(backend: Backend, record: Record) -> None:
    backend.set_line_tag(record.entry.line, _key(record.entry.number), record.model_dump_json())


def _key(number: int) -> str:
    return f"{PREFIX}{number:06}"
