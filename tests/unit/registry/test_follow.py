"""Whether a file elsewhere has the champion, as the audit trail says."""

from __future__ import annotations

import pytest

from registry.errors import TrackingError
from registry.follow import GitPlace, follows
from registry.journal import JournalRecord, PushedFile
from registry.signing import SigningKey
from unit.registry.test_journal import append, line_of

PLACE = GitPlace("ssh://git@git.example.com/clusters.git", "main", "prod/demo-awq.yaml")


def champion(trail: list[JournalRecord], key: SigningKey, number: str) -> None:
    append(trail, key, number, {"champion": number})


def pushed(trail: list[JournalRecord], key: SigningKey, number: str, path: str = PLACE.path) -> None:
    file = PushedFile(repository=PLACE.repository, branch=PLACE.branch, path=path, commit=number * 40)
    append(trail, key, number, {}, action="git", pushed=file)


def test_the_file_has_the_champion_once_an_entry_says_so(signing_key: SigningKey) -> None:
    trail: list[JournalRecord] = []
    assert follows(line_of(trail, {"candidate": "1"}), PLACE), "there is no champion"
    champion(trail, signing_key, "1")
    assert not follows(line_of(trail, {"champion": "1"}), PLACE)
    pushed(trail, signing_key, "1", "elsewhere.yaml")
    assert not follows(line_of(trail, {"champion": "1"}), PLACE)
    pushed(trail, signing_key, "1")
    assert follows(line_of(trail, {"champion": "1"}), PLACE)
    assert not follows(line_of(trail, {"champion": "2"}), PLACE), "something else moved the alias"
    append(trail, signing_key, "2", {"canary": "2"}, action="canary", weight=10)
    assert follows(line_of(trail, {"champion": "1"}), PLACE)


def test_a_push_that_may_have_succeeded_without_an_entry_is_undone_by_a_rollback(signing_key: SigningKey) -> None:
    """The push of version 2 reached the repository, and its process was killed before it wrote the entry."""
    trail: list[JournalRecord] = []
    champion(trail, signing_key, "1")
    pushed(trail, signing_key, "1")
    champion(trail, signing_key, "2")
    champion(trail, signing_key, "1")
    assert not follows(line_of(trail, {"champion": "1"}), PLACE)
    pushed(trail, signing_key, "1")
    assert follows(line_of(trail, {"champion": "1"}), PLACE)


def test_what_was_abandoned_says_nothing(signing_key: SigningKey) -> None:
    trail: list[JournalRecord] = []
    champion(trail, signing_key, "1")
    pushed(trail, signing_key, "1")
    champion(trail, signing_key, "2")
    trail[-1] = trail[-1].model_copy(update={"state": "abandoned"})
    assert follows(line_of(trail, {"champion": "1"}), PLACE)
    trail[1] = trail[1].model_copy(update={"state": "abandoned"})
    assert not follows(line_of(trail, {"champion": "1"}), PLACE)


def test_a_damaged_trail_is_an_error(signing_key: SigningKey) -> None:
    trail: list[JournalRecord] = []
    champion(trail, signing_key, "1")
    line = line_of(trail, {"champion": "1"})
    with pytest.raises(TrackingError, match="is damaged"):
        follows(type(line)(line.name, line.aliases, {**line.tags, "slipway.journal.000002": "{}"}), PLACE)
