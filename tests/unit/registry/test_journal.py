"""The audit trail as a chain: what was removed, altered or put in between is seen, in trails of every format."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from mlflow_tables import write_tables

from registry import journal, trails
from registry.backend import MANIFEST_TAG, Line, Version
from registry.errors import NotFoundError, PullError, TrackingError
from registry.follow import GitPlace, follows
from registry.journal import PAYLOAD_TYPE, AliasMove, JournalEntry, JournalRecord
from registry.policy import Policy
from registry.resolve import AuditMismatchError, check, referenced_versions, resolve, resolve_alias, traffic
from registry.signing import SigningKey, load_or_create_key, load_trusted_keys

COMPAT = Path(__file__).parent.parent.parent / "compat_journal"
COMPAT_RELEASES = {
    "1": "sha256:d14f4a5aef2acfe1601319b0feb463c9aee3cc419e6f89ffab34c1fc051d0997",
    "2": "sha256:3ddd802b9358fdaa98d381d8e01e67527814a9f3bd88349e3acf91bc92bece34",
}
DIGESTS = {number: f"sha256:{letter * 64}" for number, letter in (("1", "a"), ("2", "b"), ("3", "c"))}


def line_of(trail: list[JournalRecord], aliases: Mapping[str, str]) -> Line:
    return Line("demo-awq", aliases, {f"{journal.PREFIX}{one.entry.number:06}": one.model_dump_json() for one in trail})


def version(number: str, digest: str) -> Version:
    return Version("demo-awq", number, (), {MANIFEST_TAG: digest}, "/nowhere", datetime.now(UTC))


def append(
    trail: list[JournalRecord],
    key: SigningKey | None,
    number: str,
    moves: Mapping[str, str | None],
    **options: Any,  # noqa: ANN401 - fields of an entry
) -> None:
    """Write an entry as a promoter does, signed where there is a key."""
    entry = JournalEntry(
        number=trail[-1].entry.number + 1 if trail else 1,
        line="demo-awq",
        version=number,
        digest=DIGESTS[number],
        moves=tuple(
            AliasMove(alias=alias, before=None, after=after, digest=DIGESTS[after] if after else None)
            for alias, after in moves.items()
        ),
        who="ann@host",
        when="2026-11-29T01:02:03.000+00:00",
        why="by hand",
        **{"action": "promote", "prior": journal.trail_digest(trail, [key.public] if key else []), **options},
    )
    signature = None
    if key is not None:
        signature = base64.b64encode(key.sign(entry.payload(), kind=PAYLOAD_TYPE).to_bytes()).decode()
    trail.append(JournalRecord(state="done", entry=entry, signature=signature))


@pytest.fixture
def trail(signing_key: SigningKey) -> list[JournalRecord]:
    """Three releases, each champion in its turn."""
    made: list[JournalRecord] = []
    append(made, signing_key, "1", {"champion": "1"})
    append(made, signing_key, "2", {"previous": "1", "champion": "2"})
    append(made, signing_key, "3", {"previous": "2", "champion": "3"})
    return made


@pytest.fixture
def policy(signing_key: SigningKey) -> Policy:
    return Policy((signing_key.public,), signed_moves=True)


def old(name: str = "1-unchained") -> tuple[list[JournalRecord], Policy]:
    """A trail that an earlier version wrote, and who is trusted for it.

    The first was written before entries were chained: two releases, a canary that nobody signed, a rollback. The others
    are of the releases `tests/compat/2-p256-manifest` and `5-mlbom`, by the same acts, all signed; `3-git` was written
    with entries of a file in Git in between.
    """
    folder = COMPAT / name
    found = Line("demo-awq", {}, json.loads((folder / "tags.json").read_text()))
    return journal.records(found), Policy(load_trusted_keys([folder / "release.pub"]), signed_moves=True)


def test_a_trail_of_the_first_format_is_read_and_its_signatures_hold() -> None:
    found, policy = old()
    assert [record.signed_by(policy.keys) is not None for record in found] == [True, True, False, True]
    aliases = {"candidate": "2", "champion": "1", "previous": "2"}
    assert resolve_alias(line_of(found, aliases), "champion", policy).digest == DIGESTS["1"]
    line = line_of(found, aliases)
    previous = resolve_alias(line, "previous", policy)
    check(line, version("2", DIGESTS["2"]), previous, policy)
    with pytest.raises(PullError, match="the version was replaced"):
        check(line, version("2", DIGESTS["1"]), previous, policy)


def test_what_follows_a_trail_of_the_first_format_covers_all_of_it(tmp_path: Path) -> None:
    found, policy = old()
    key = load_or_create_key(tmp_path / "new.pem")
    append(found, key, "3", {"champion": "3"}, prior=journal.trail_digest(found, policy.keys))
    trusted = (*policy.keys, key.public)
    assert journal.chain_break(found, trusted) is None
    # The entry that nobody signed, and that no later one moves against, could be altered until now.
    other = found[2].model_copy(update={"entry": found[2].entry.model_copy(update={"weight": 90})})
    assert journal.chain_break([*found[:2], other, *found[3:]], trusted) is not None
    assert "entry 1 of the audit trail is missing" in (journal.chain_break(found[1:], trusted) or "")
    assert "older format" in (journal.chain_break(_with_old_last(found, key), trusted) or "")


@pytest.mark.parametrize("name", ["2-chained", "3-git"])
def test_a_chained_trail_of_an_earlier_version_is_whole_and_says_which_releases_its_aliases_mean(name: str) -> None:
    found, policy = old(name)
    assert journal.chain_break(found, policy.keys) is None
    line = line_of(found, {"candidate": "2", "champion": "1", "previous": "2"})
    for alias in ("champion", "previous"):
        release = resolve_alias(line, alias, policy)
        assert release.digest == COMPAT_RELEASES[line.aliases[alias]]
        check(line, version(line.aliases[alias], release.digest or ""), release, policy)
    for at in range(len(found)):
        assert journal.chain_break([*found[:at], *found[at + 1 :]], policy.keys) is not None or at == len(found) - 1
        other = found[at].model_copy(update={"entry": found[at].entry.model_copy(update={"why": "another"})})
        assert other.signed_by(policy.keys) is None
        assert found[at].signed_by(policy.keys) is not None


def test_an_earlier_trail_says_which_commit_of_a_file_has_the_champion() -> None:
    found, policy = old("3-git")
    line, place = line_of(found, {"champion": "1"}), GitPlace("https://git.example.com/deploy.git", "main", "demo.yaml")
    assert follows(line, place)
    assert not follows(line_of(found[:-1], line.aliases), place)
    pushed = found[-1].entry.pushed
    assert pushed is not None
    forged = pushed.model_copy(update={"commit": "0" * 40})
    entry = found[-1].entry.model_copy(update={"pushed": forged})
    assert found[-1].model_copy(update={"entry": entry}).signed_by(policy.keys) is None


def _with_old_last(found: list[JournalRecord], key: SigningKey) -> list[JournalRecord]:
    last = found[1].entry.model_copy(update={"number": 6})
    signature = base64.b64encode(key.sign(last.payload(), kind=PAYLOAD_TYPE).to_bytes()).decode()
    return [*found, JournalRecord(state="done", entry=last, signature=signature)]


def test_digests_of_moves_that_no_signature_covers_are_refused(trail: list[JournalRecord]) -> None:
    document = trail[1].model_dump(mode="json")
    document["entry"]["prior"] = None
    line = replace(line_of(trail, {}), tags={f"{journal.PREFIX}000002": json.dumps(document)})
    with pytest.raises(TrackingError, match="damaged"):
        journal.records(line)


def test_a_whole_trail_says_what_each_alias_means(trail: list[JournalRecord], policy: Policy) -> None:
    line = line_of(trail, {"champion": "3", "previous": "2"})
    assert resolve_alias(line, "champion", policy).digest == DIGESTS["3"]
    assert resolve_alias(line, "previous", policy).digest == DIGESTS["2"]
    check(line, version("2", DIGESTS["2"]), resolve_alias(line, "previous", policy), policy)


@pytest.mark.parametrize("signed_moves", [True, False])
def test_an_older_release_under_previous_is_refused_once_the_oldest_entries_are_gone(
    trail: list[JournalRecord], signing_key: SigningKey, signed_moves: bool
) -> None:
    policy = Policy((signing_key.public,), signed_moves=signed_moves)
    line = line_of(trail, {"champion": "3", "previous": "2"})
    previous = resolve_alias(line, "previous", policy)
    with pytest.raises(PullError, match="the version was replaced"):
        check(line, version("2", DIGESTS["1"]), previous, policy)
    cut = line_of(trail[2:], line.aliases)
    with pytest.raises(AuditMismatchError, match="entry 1 of the audit trail is missing"):
        resolve_alias(cut, "previous", policy)


@pytest.mark.parametrize("kept", [(0, 2), (1, 2), (2,), (0, 0, 2)])
def test_an_entry_that_is_missing_or_put_in_anothers_place_breaks_the_chain(
    trail: list[JournalRecord], policy: Policy, kept: tuple[int, ...]
) -> None:
    spoiled = [trail[at] for at in kept]
    if len(kept) == 3:
        spoiled[1] = spoiled[1].model_copy(update={"entry": spoiled[1].entry.model_copy(update={"number": 2})})
    assert journal.chain_break(spoiled, policy.keys) is not None
    with pytest.raises(AuditMismatchError, match="audit trail"):
        resolve_alias(line_of(spoiled, {"champion": "3"}), "champion", policy)
    with pytest.raises(PullError, match="can't be checked against the audit trail"):
        check(line_of(spoiled, {}), version("2", DIGESTS["1"]), resolve_alias(line_of([], {}), "x", Policy(())), policy)


def test_an_entry_that_nobody_signed_begins_no_trail(
    trail: list[JournalRecord], policy: Policy, signing_key: SigningKey
) -> None:
    forged: list[JournalRecord] = [trail[0], trail[1]]
    append(forged, None, "1", {"champion": "1"}, prior=journal.START)
    assert journal.trail_digest(forged, policy.keys) != journal.trail_digest(forged[2:], policy.keys)
    append(forged, signing_key, "3", {"champion": "3"})
    assert journal.chain_break(forged, policy.keys) is None
    assert journal.chain_break(forged[2:], policy.keys) is not None


def test_a_trail_that_begins_anew_is_whole_whatever_was_before(
    trail: list[JournalRecord], policy: Policy, signing_key: SigningKey
) -> None:
    broken = trail[1:]
    append(broken, signing_key, "2", {"champion": "2"}, prior=journal.START)
    append(broken, signing_key, "3", {"champion": "3"})
    assert journal.chain_break(broken, policy.keys) is None
    assert journal.chain_break(broken[1:], policy.keys) is None
    assert journal.chain_break([*broken[:1], *broken[3:]], policy.keys) is not None


def test_junk_after_the_last_signed_entry_moves_nothing_and_breaks_no_chain(
    trail: list[JournalRecord], policy: Policy, signing_key: SigningKey
) -> None:
    append(trail, None, "1", {"canary": "1"}, prior=DIGESTS["1"])
    assert journal.chain_break(trail, policy.keys) is None
    append(trail, signing_key, "2", {"champion": "2"})
    assert journal.chain_break(trail, policy.keys) is None


@pytest.mark.parametrize("weight", [-1, 101, "ten", None])
def test_a_canarys_share_is_that_of_the_signed_entry_and_never_of_the_tag(
    trail: list[JournalRecord], policy: Policy, signing_key: SigningKey, weight: object
) -> None:
    append(trail, signing_key, "1", {"canary": "1"}, weight=10)
    line = line_of(trail, {"champion": "3", "canary": "1"})
    junk = json.dumps({"version": "2", "weight": 100})
    line = replace(line, tags={**line.tags, journal.WEIGHT_TAG: junk})
    assert resolve_alias(line, "canary", policy).weight == 10
    document = trail[-1].model_dump(mode="json")
    document["entry"]["weight"] = weight
    spoiled = replace(line, tags={**line.tags, f"{journal.PREFIX}000004": json.dumps(document)})
    with pytest.raises((TrackingError, AuditMismatchError)):
        resolve_alias(spoiled, "canary", policy)


def test_what_the_trail_names_stays_though_something_else_moved_the_alias(trail: list[JournalRecord]) -> None:
    assert referenced_versions(line_of(trail, {"champion": "1"})) == {"1", "2", "3"}
    assert referenced_versions(line_of(trail[:1], {})) == {"1"}
    abandoned = [record.model_copy(update={"state": "abandoned"}) for record in trail]
    assert referenced_versions(line_of([*trail[:2], abandoned[2]], {"champion": "1"})) == {"1", "2", "3"}


def test_a_canary_that_anybody_calls_abandoned_is_no_reason_to_leave_it_out(
    trail: list[JournalRecord], policy: Policy, signing_key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.resolve.time.sleep", lambda _: None)
    append(trail, signing_key, "1", {"canary": "1"}, weight=10)
    uri = write_tables(tmp_path / "mlflow.db", line_of(trail, {"champion": "3", "canary": "1"}), DIGESTS)
    assert [(share.version.version, share.weight) for share in traffic("demo-awq", "champion", uri, policy)] == [
        ("3", 90), ("1", 10),
    ]  # fmt: skip
    trail[-1] = trail[-1].model_copy(update={"state": "abandoned"})
    uri = write_tables(tmp_path / "mlflow.db", line_of(trail, {"champion": "3"}), DIGESTS)
    with pytest.raises(AuditMismatchError, match="`demo-awq@canary` names version None, but the audit trail says 1"):
        traffic("demo-awq", "champion", uri, policy)


def test_a_version_that_is_not_there_is_not_found(trail: list[JournalRecord], policy: Policy, tmp_path: Path) -> None:
    uri = write_tables(tmp_path / "mlflow.db", line_of(trail, {"champion": "3"}), DIGESTS)
    assert resolve("demo-awq", "v2", uri, policy).version == "2"
    for number in ("4", "9" * 30):
        with pytest.raises(NotFoundError, match=f"`demo-awq` has no version {number}"):
            resolve("demo-awq", f"v{number}", uri, policy)


def test_a_version_of_which_no_signed_entry_says_the_digest_is_not_what_an_alias_means(
    trail: list[JournalRecord], policy: Policy, signing_key: SigningKey
) -> None:
    moves = (AliasMove(alias="previous", before=None, after="7"),)
    entry = trail[-1].entry.model_copy(
        update={"number": 4, "moves": moves, "prior": journal.trail_digest(trail, policy.keys)}
    )
    signature = base64.b64encode(signing_key.sign(entry.payload(), kind=PAYLOAD_TYPE).to_bytes()).decode()
    line = line_of([*trail, JournalRecord(state="done", entry=entry, signature=signature)], {"previous": "7"})
    with pytest.raises(PullError, match=r"no signed entry .* says which release version 7 is"):
        check(line, version("7", DIGESTS["1"]), resolve_alias(line, "previous", policy), policy)


def test_the_cache_remembers_each_registrys_trail_by_itself(
    trail: list[JournalRecord], policy: Policy, tmp_path: Path
) -> None:
    line, shorter = line_of(trail, {}), line_of(trail[:1], {})
    trails.remember(tmp_path, "https://user:word@staging.example.com", line, policy)
    trails.remember(tmp_path, "https://production.example.com", shorter, policy)
    trails.remember(tmp_path, "https://staging.example.com/", line, policy)
    with pytest.raises(PullError, match="ends at entry 1, and was at 3 before: the registry was set back"):
        trails.remember(tmp_path, "https://staging.example.com", shorter, policy)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "word" in path.read_text()]


def test_the_cache_remembers_which_entry_was_the_last(
    trail: list[JournalRecord], policy: Policy, signing_key: SigningKey, tmp_path: Path
) -> None:
    trails.remember(tmp_path, "https://a.example.com", line_of(trail, {}), policy)
    other = trail[:2]
    append(other, signing_key, "1", {"champion": "1"})
    with pytest.raises(PullError, match=r"entry 3 .* is another one than was there before"):
        trails.remember(tmp_path, "https://a.example.com", line_of(other, {}), policy)


@pytest.mark.parametrize("spoil", ["link", "pipe", "junk", "nothing", "endless"])
def test_what_was_seen_and_cannot_be_read_is_not_taken_for_nothing(
    trail: list[JournalRecord], policy: Policy, tmp_path: Path, spoil: str
) -> None:
    trails.remember(tmp_path, "https://a.example.com", line_of(trail, {}), policy)
    place = next(path for path in tmp_path.rglob("demo-awq"))
    kept = place.read_text()
    place.unlink()
    if spoil == "link":
        (tmp_path / "other").write_text(kept)
        place.symlink_to(tmp_path / "other")
    elif spoil == "pipe":
        os.mkfifo(place)
    else:
        place.write_text({"junk": "3", "nothing": "", "endless": kept + " " * 1000}[spoil])
    with pytest.raises(PullError, match=r"audit trail.*"):
        trails.remember(tmp_path, "https://a.example.com", line_of(trail[:1], {}), policy)


def test_a_link_that_somebody_left_in_a_shared_cache_is_not_written_through(
    trail: list[JournalRecord], policy: Policy, tmp_path: Path
) -> None:
    trails.remember(tmp_path, "https://a.example.com", line_of(trail[:1], {}), policy)
    (tmp_path / "victim").write_text("own")
    folder = next(path for path in tmp_path.rglob("demo-awq")).parent
    (folder / f".demo-awq.{os.getpid()}").symlink_to(tmp_path / "victim")
    trails.remember(tmp_path, "https://a.example.com", line_of(trail, {}), policy)
    assert (tmp_path / "victim").read_text() == "own"
