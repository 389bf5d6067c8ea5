"""What is written elsewhere follows the champion, and the audit trail says where and how.

Both happen under the promotion lock: what was written last is what is champion, whoever else promotes meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable

from registry import journal
from registry.backend import Line
from registry.journal import JournalEntry, PushedFile
from registry.moves import opened, signers
from registry.policy import Trust, policy_of
from registry.progress import Progress, silent
from registry.pull import ReleaseMetadata, read_metadata
from registry.resolve import CHAMPION
from registry.signing import SigningKey

Place = tuple[str, str, str]
"""A repository, a branch and a path in it."""


def follow_champion(
    name: str,
    place: Place,
    write: Callable[[ReleaseMetadata], PushedFile],
    tracking_uri: str,
    trusted_keys: Trust,
    *,
    who: str | None = None,
    key: SigningKey | None = None,
    progress: Progress = silent,
) -> JournalEntry | None:
    """Let ``write`` write the champion of the release line to ``place``, and record it; None where it is there.

    Raises:
        RegistryError: the champion is not what was signed, or the registry can't be reached.
    """
    policy = policy_of(trusted_keys)
    with opened(name, tracking_uri, policy, progress) as (held, backend, line, _):
        if follows(line, place):
            return None
        champion = read_metadata(f"{name}@{CHAMPION}", [], tracking_uri=tracking_uri, trusted_keys=policy)
        pushed = write(champion)
        return journal.record_and_move(
            held, backend, line,
            action="git", version=champion.version, digest=champion.manifest.digest, moves={}, pushed=pushed, who=who,
            why="the champion's image is in Git", key=key, trusted=signers(policy, key),
        )  # fmt: skip


def follows(line: Line, place: Place) -> bool:
    """Whether the audit trail says that the place has the champion's release, or there is no champion."""
    if CHAMPION not in line.aliases:
        return True
    found = None
    for record in journal.records(line):
        pushed = record.entry.pushed
        if pushed is not None and (pushed.repository, pushed.branch, pushed.path) == place:
            found = record
    return found is not None and found.entry.version == line.aliases[CHAMPION] and found.state != "abandoned"
