"""Writes the champion outside of the registry, as to a file in Git, and records in the audit trail where and how.

Both happen under the promotion lock, so what was written last is the champion, whoever else promotes meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from registry import journal
from registry.backend import Line
from registry.errors import PromotionError
from registry.journal import JournalEntry, PushedFile
from registry.moves import opened, signers
from registry.policy import Policy, Trust, policy_of
from registry.progress import Progress, silent
from registry.pull import ReleaseMetadata, read_metadata
from registry.resolve import CHAMPION
from registry.signing import SigningKey


@dataclass(frozen=True)
class GitPlace:
    """A file: the repository's address, the branch, and the path in it."""

    repository: str
    branch: str
    path: str

    def __str__(self) -> str:
        return f"{self.path} on {self.branch} of {self.repository}"


def follow_champion(
    name: str,
    place: GitPlace,
    write: Callable[[ReleaseMetadata], str],
    tracking_uri: str,
    trusted_keys: Trust,
    *,
    who: str | None = None,
    key: SigningKey | None = None,
    progress: Progress = silent,
) -> JournalEntry | None:
    """Let ``write`` write the champion of the release line to ``place``, and record it; None where it is there.

    ``write`` returns the commit that has it.

    Raises:
        PromotionError: the entry would not be signed by a trusted key; nothing was written.
        RegistryError: the champion is not what was signed, or the registry can't be reached.
    """
    policy = policy_of(trusted_keys)
    with opened(name, tracking_uri, policy, progress) as (held, backend, line, _):
        if follows(line, place):
            return None
        _check_signer(line, policy, key)
        champion = read_metadata(f"{name}@{CHAMPION}", [], tracking_uri=tracking_uri, trusted_keys=policy)
        pushed = PushedFile(repository=place.repository, branch=place.branch, path=place.path, commit=write(champion))
        return journal.record_and_move(
            held, backend, line,
            action="git", version=champion.version, digest=champion.manifest.digest, moves={}, pushed=pushed, who=who,
            why="the champion's image is in Git", key=key, trusted=signers(policy, key),
        )  # fmt: skip


def follows(line: Line, place: GitPlace) -> bool:
    """Whether the audit trail says that the place has the champion's release, or there is no champion.

    Only an entry after the champion's last move counts: a push before that move may have succeeded without an entry,
    because its answer was lost or its process killed.

    Raises:
        TrackingError: the audit trail is damaged.
    """
    if CHAMPION not in line.aliases:
        return True
    found = moved = None
    for record in journal.records(line):
        pushed = record.entry.pushed
        if record.state == "abandoned":
            continue
        if pushed is not None and GitPlace(pushed.repository, pushed.branch, pushed.path) == place:
            found = record.entry
        elif any(move.alias == CHAMPION for move in record.entry.moves):
            moved = record.entry
    if found is None or found.version != line.aliases[CHAMPION]:
        return False
    return moved is None or moved.number < found.number


def _check_signer(line: Line, policy: Policy, key: SigningKey | None) -> None:
    """Refuse an entry that would end the pulls of everyone whose policy asks for signed moves."""
    moved = journal.last_move(journal.records(line), CHAMPION)
    signed = policy.signed_moves or (moved is not None and moved.signature is not None)
    if signed and (key is None or (policy.signed_moves and key.public not in policy.keys)):
        raise PromotionError(
            f"the champion of `{line.name}` is not written to a file: its audit trail is signed, and this machine has "
            "no trusted key to sign the entry with; run `slipway promote` where releases are signed"
        )
