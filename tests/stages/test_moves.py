"""Rollback, promotion by hand, canary and the audit trail, against a real MLflow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from release_folder import make_release

from pipeline.commands.aliases import history
from pipeline.operations.rescan import RescanError, rescan
from pipeline.serving.deployment import gather
from pipeline.serving.serve import desired_releases
from pipeline.settings import Settings
from registry import canary, journal, promote_version, pull, rollback
from registry import promote as promoting
from registry.backend import MANIFEST_TAG
from registry.catalog import current, line
from registry.errors import PromotionError, PullError, TrackingError
from registry.file_locks import locked
from registry.policy import Policy
from registry.promote import promote
from registry.signing import SigningKey, load_or_create_key
from registry.tracking import connected, local_folder

CHECKOUT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> SigningKey:
    return load_or_create_key(tmp_path_factory.mktemp("keys") / "release.pem")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, key: SigningKey) -> Path:
    """A store with three releases of one line, made once."""
    folder = tmp_path_factory.mktemp("store")
    for number in range(3):
        make_release(folder / f"release-{number}", key, created=f"2026-11-24T01:02:0{number}Z")
        promote(folder / f"release-{number}", f"sqlite:///{folder}/mlflow.db", [key.public], key=key)
    return folder


@pytest.fixture
def uri(store: Path, tmp_path: Path) -> str:
    """A copy of that store; the files are shared, which nothing here changes but by way of a copy of its own."""
    shutil.copy(store / "mlflow.db", tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def by_alias(uri: str) -> dict[str, str]:
    return {alias: version.version for version in current(uri, "demo-awq") for alias in version.aliases}


def trail(uri: str) -> list[journal.JournalRecord]:
    found = line(uri, "demo-awq")
    assert found is not None
    return journal.records(found)


def test_a_rollback_swaps_and_a_second_one_swaps_back(uri: str, key: SigningKey, tmp_path: Path) -> None:
    back = rollback("demo-awq", uri, [key.public], why="answers got worse", who="ann@host")
    assert (back.version, back.replaced, back.aliases) == ("2", "3", ("champion",))
    assert by_alias(uri) == {"candidate": "3", "champion": "2", "previous": "3"}
    assert pull("demo-awq", tmp_path / "out", tracking_uri=uri, trusted_keys=[key.public]).version == "2"
    again = rollback("demo-awq", uri, [key.public])
    assert (again.version, again.replaced) == ("3", "2")
    assert by_alias(uri) == {"candidate": "3", "champion": "3", "previous": "2"}


def test_the_audit_trail_says_who_when_from_to_and_why_in_order_and_signed(uri: str, key: SigningKey) -> None:
    rollback("demo-awq", uri, [key.public], why="answers got worse", who="ann@host", key=key)
    found = trail(uri)
    assert [record.entry.number for record in found] == [1, 2, 3, 4]
    assert {record.state for record in found} == {"done"}
    assert [record.entry.when for record in found] == sorted(record.entry.when for record in found)
    last = found[-1].entry
    assert (last.action, last.who, last.why) == ("rollback", "ann@host", "answers got worse")
    assert [(move.alias, move.before, move.after) for move in last.moves] == [
        ("champion", "3", "2"),
        ("previous", "2", "3"),
    ]
    assert all(record.signed_by([key.public]) == key.public.keyid for record in found)


def test_an_entry_that_was_altered_is_signed_no_more(uri: str, key: SigningKey, tmp_path: Path) -> None:
    last = trail(uri)[-1]
    forged = last.model_copy(update={"entry": last.entry.model_copy(update={"why": "another"})})
    assert last.signed_by([key.public]) == key.public.keyid
    assert forged.signed_by([key.public]) is None
    assert last.signed_by([load_or_create_key(tmp_path / "other.pem").public]) is None
    assert last.model_copy(update={"signature": "?"}).signed_by([key.public]) is None


def test_a_version_is_made_champion_by_hand(uri: str, key: SigningKey) -> None:
    moved = promote_version("demo-awq", "1", uri, [key.public])
    assert (moved.version, moved.replaced) == ("1", "3")
    assert by_alias(uri) == {"candidate": "3", "champion": "1", "previous": "3"}
    assert promote_version("demo-awq", "1", uri, [key.public]).entry is None
    assert len(trail(uri)) == 4


def test_a_canary_is_recorded_pulled_and_ended(uri: str, key: SigningKey, tmp_path: Path) -> None:
    canary("demo-awq", "1", 10, uri, [key.public])
    found = line(uri, "demo-awq")
    assert found is not None
    assert json.loads(found.tags["slipway.canary"]) == {"version": "1", "weight": 10}
    assert pull("demo-awq@canary", tmp_path / "out", tracking_uri=uri, trusted_keys=[key.public]).version == "1"
    canary("demo-awq", "1", 0, uri, [key.public])
    assert "canary" not in by_alias(uri)
    canary("demo-awq", "1", 50, uri, [key.public])
    promote_version("demo-awq", "1", uri, [key.public])
    found = line(uri, "demo-awq")
    assert found is not None
    assert found.tags["slipway.canary"] == "{}"
    assert "canary" not in found.aliases


def test_what_makes_no_sense_is_refused_and_moves_nothing(uri: str, key: SigningKey) -> None:
    before = by_alias(uri)
    with pytest.raises(PromotionError, match="version 3 of `demo-awq` is champion"):
        canary("demo-awq", "3", 10, uri, [key.public])
    with pytest.raises(PromotionError, match="is not a percentage"):
        canary("demo-awq", "1", 101, uri, [key.public])
    with pytest.raises(PromotionError, match="is not the canary"):
        canary("demo-awq", "1", 0, uri, [key.public])
    with pytest.raises(TrackingError, match=r"no version 9 \(there is: 1, 2, 3\)"):
        promote_version("demo-awq", "9", uri, [key.public])
    with pytest.raises(PromotionError, match="did you mean `demo-awq`"):
        rollback("demo-aqw", uri, [key.public])
    assert by_alias(uri) == before
    assert len(trail(uri)) == 3


def test_a_line_that_is_removed_while_it_is_waited_for_is_said(uri: str, key: SigningKey) -> None:
    with ExitStack() as other:
        other.enter_context(locked(Path(f"{uri.removeprefix('sqlite:///')}.promotion.lock")))

        def remove(_: str) -> None:
            with connected(uri) as client:
                client.delete_registered_model("demo-awq")
            other.close()

        with pytest.raises(PromotionError, match="`demo-awq` was removed during the promotion"):
            rollback("demo-awq", uri, [key.public], key=key, progress=remove)


def test_a_line_that_is_removed_while_a_release_of_it_is_verified_is_said(
    uri: str, store: Path, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove(*_: object) -> None:
        """In place of the verification, in which another process is quicker."""
        with connected(uri) as client:
            client.delete_registered_model("demo-awq")

    monkeypatch.setattr(promoting, "_verify_registered", remove)
    with pytest.raises(PromotionError, match="not promoted: `demo-awq` was removed during the promotion"):
        promote(store / "release-0", uri, [key.public], key=key)


def test_the_first_champion_has_nothing_to_go_back_to(tmp_path: Path, store: Path, key: SigningKey) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    promote(store / "release-0", uri, [key.public])
    with pytest.raises(PromotionError, match="no earlier champion to roll back to"):
        rollback("demo-awq", uri, [key.public])


def test_a_version_that_was_altered_becomes_champion_by_no_command(
    tmp_path: Path, store: Path, key: SigningKey
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for number in range(2):
        promote(store / f"release-{number}", uri, [key.public])
    older = next(version for version in current(uri, "demo-awq") if version.version == "1")
    folder = local_folder(older.location)
    assert folder is not None
    (folder / "config.json").unlink()  # it is the release's own, by another name
    (folder / "config.json").write_bytes(b"{}")
    commands: tuple[Callable[[], object], ...] = (
        lambda: rollback("demo-awq", uri, [key.public]),
        lambda: promote_version("demo-awq", "1", uri, [key.public]),
        lambda: canary("demo-awq", "1", 10, uri, [key.public]),
    )
    for command in commands:
        with pytest.raises(PromotionError, match=r"config\.json: changed"):
            command()
    with pytest.raises(PromotionError, match="gate rescan: the release has no verdict"):
        promote_version("demo-awq", "2", uri, [key.public], required_gates=["rescan"])
    assert by_alias(uri) == {"candidate": "2", "champion": "2", "previous": "1"}
    assert len(trail(uri)) == 2


def write(uri: str, record: journal.JournalRecord) -> None:
    """Write an entry as whoever can write to MLflow can."""
    with connected(uri) as client:
        key = f"slipway.journal.{record.entry.number:06}"
        client.set_registered_model_tag("demo-awq", key, record.model_dump_json())


def point(uri: str, alias: str, number: str) -> None:
    with connected(uri) as client:
        client.set_registered_model_alias("demo-awq", alias, number)


def _abandon(uri: str) -> None:
    write(uri, trail(uri)[2].model_copy(update={"state": "abandoned"}))


def _begin(uri: str) -> None:
    write(uri, trail(uri)[2].model_copy(update={"state": "begun"}))


def _take_out(uri: str) -> None:
    with connected(uri) as client:
        client.delete_registered_model_tag("demo-awq", "slipway.journal.000003")


def _replace(uri: str) -> None:
    third = trail(uri)[2]
    moves = (journal.AliasMove(alias="candidate", before="2", after="3"),)
    write(uri, third.model_copy(update={"entry": third.entry.model_copy(update={"moves": moves})}))


def _strip(uri: str) -> None:
    write(uri, trail(uri)[2].model_copy(update={"signature": None}))


@pytest.mark.parametrize("spoil", [_abandon, _begin, _take_out, _replace, _strip])
def test_an_older_release_under_the_champions_name_is_refused_whatever_was_done_to_the_trail(
    uri: str, key: SigningKey, tmp_path: Path, spoil: Callable[[str], None]
) -> None:
    policy = Policy((key.public,), signed_moves=True)
    canary("demo-awq", "1", 10, uri, [key.public], key=key)  # so that an entry follows that moves another alias
    assert pull("demo-awq", tmp_path / "before", tracking_uri=uri, trusted_keys=policy).version == "3"
    spoil(uri)
    point(uri, "champion", "2")
    with pytest.raises(PullError, match="audit trail"):
        pull("demo-awq", tmp_path / "after", tracking_uri=uri, trusted_keys=policy)
    promote_version("demo-awq", "2", uri, policy, key=key)  # as the error says
    assert pull("demo-awq", tmp_path / "after", tracking_uri=uri, trusted_keys=policy).version == "2"


def test_a_version_that_became_another_release_is_refused(uri: str, key: SigningKey, tmp_path: Path) -> None:
    policy = Policy((key.public,), signed_moves=True)
    other = next(version for version in current(uri, "demo-awq") if version.version == "2")
    with connected(uri) as client:
        client.set_model_version_tag("demo-awq", "3", MANIFEST_TAG, other.manifest_digest)
    with pytest.raises(PullError, match="the version was replaced"):
        pull("demo-awq", tmp_path / "out", tracking_uri=uri, trusted_keys=policy)


def test_a_champion_that_something_else_assigned_is_confirmed_by_hand(
    uri: str, key: SigningKey, tmp_path: Path
) -> None:
    point(uri, "champion", "1")
    with pytest.raises(PullError, match="set the right version with `slipway promote demo-awq --version N`"):
        pull("demo-awq", tmp_path / "out", tracking_uri=uri, trusted_keys=[key.public])
    moved = promote_version("demo-awq", "1", uri, [key.public], key=key)
    assert (moved.entry, moved.replaced) == (4, "1")
    assert by_alias(uri) == {"candidate": "3", "champion": "1", "previous": "2"}
    assert pull("demo-awq", tmp_path / "out", tracking_uri=uri, trusted_keys=[key.public]).version == "1"
    assert promote_version("demo-awq", "1", uri, [key.public], key=key).entry is None


def test_promoting_a_release_again_confirms_what_it_is(uri: str, store: Path, key: SigningKey, tmp_path: Path) -> None:
    rollback("demo-awq", uri, [key.public], key=key)
    point(uri, "champion", "3")
    assert promote(store / "release-2", uri, [key.public], key=key).reused
    assert pull("demo-awq", tmp_path / "out", tracking_uri=uri, trusted_keys=[key.public]).version == "3"
    entries = len(trail(uri))
    assert promote(store / "release-2", uri, [key.public], key=key).reused
    assert len(trail(uri)) == entries


def test_a_move_that_nobody_signed_is_signed_by_hand(uri: str, key: SigningKey, tmp_path: Path) -> None:
    policy = Policy((key.public,), signed_moves=True)
    rollback("demo-awq", uri, policy)
    with pytest.raises(PullError, match="no trusted key signed entry 4"):
        pull("demo-awq", tmp_path / "out", tracking_uri=uri, trusted_keys=policy)
    promote_version("demo-awq", "2", uri, policy, key=key)
    assert pull("demo-awq", tmp_path / "out", tracking_uri=uri, trusted_keys=policy).version == "2"


def test_an_act_that_anybody_began_moves_no_alias_to_what_was_altered(
    tmp_path: Path, store: Path, key: SigningKey
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for number in range(2):
        promote(store / f"release-{number}", uri, [key.public], key=key)
    folder = local_folder(current(uri, "demo-awq")[1].location)
    assert folder is not None
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(b"{}")
    last = trail(uri)[-1].entry
    moves = (journal.AliasMove(alias="champion", before="2", after="1"),)
    entry = last.model_copy(update={"number": 3, "version": "1", "moves": moves})
    write(uri, journal.JournalRecord(state="begun", entry=entry))
    assert promote_version("demo-awq", "2", uri, [key.public]).entry is None
    assert by_alias(uri)["champion"] == "2"
    assert trail(uri)[-1].state == "abandoned"


def test_an_act_that_nobody_signed_is_not_finished_where_moves_must_be(uri: str, key: SigningKey) -> None:
    last = trail(uri)[-1].entry
    moves = (journal.AliasMove(alias="champion", before="3", after="1"),)
    entry = last.model_copy(update={"number": 4, "version": "1", "moves": moves})
    write(uri, journal.JournalRecord(state="begun", entry=entry))
    promote_version("demo-awq", "3", uri, Policy((key.public,), signed_moves=True), key=key)
    assert by_alias(uri)["champion"] == "3"


def test_an_act_that_was_done_long_ago_is_not_done_again(uri: str, key: SigningKey) -> None:
    write(uri, trail(uri)[0].model_copy(update={"state": "begun"}))
    promote_version("demo-awq", "3", uri, [key.public])
    assert by_alias(uri) == {"candidate": "3", "champion": "3", "previous": "2"}


def test_the_cache_remembers_no_entry_that_nobody_signed(uri: str, key: SigningKey, tmp_path: Path) -> None:
    policy, cache = Policy((key.public,), signed_moves=True), tmp_path / "cache"
    entry = trail(uri)[-1].entry.model_copy(update={"number": 999_999})
    write(uri, journal.JournalRecord(state="done", entry=entry))
    pull("demo-awq@v3", tmp_path / "one", tracking_uri=uri, trusted_keys=policy, cache=cache)
    with connected(uri) as client:
        client.delete_registered_model_tag("demo-awq", "slipway.journal.999999")
    pull("demo-awq", tmp_path / "two", tracking_uri=uri, trusted_keys=policy, cache=cache)
    _take_out(uri)
    with pytest.raises(PullError, match="the registry was set back"):
        pull("demo-awq@v2", tmp_path / "three", tracking_uri=uri, trusted_keys=policy, cache=cache)


def test_history_says_who_signed_as_the_policy_has_it(uri: str, key: SigningKey, tmp_path: Path) -> None:
    (tmp_path / "release.pub").write_bytes(key.public.pem())
    (tmp_path / "policy.toml").write_text('[signers]\nkeys = ["release.pub"]\n')
    environment = {
        "SLIPWAY_HOME": str(tmp_path / "home"), "SLIPWAY_POLICY": str(tmp_path / "policy.toml"),
        "MLFLOW_TRACKING_URI": uri, "SLIPWAY_TRUSTED_KEYS": None,
    }  # fmt: skip
    shown = CliRunner().invoke(history, ["demo-awq", "--json"], env=environment, catch_exceptions=False)
    assert {entry["signed_by"] for entry in json.loads(shown.stdout)} == {key.public.keyid}


KILLED = """
import os, signal, sys
from pathlib import Path
import mlflow
from registry import rollback
from registry.signing import load_trusted_keys

name, call, uri, public = sys.argv[1:]
left = int(call)
method = getattr(mlflow.MlflowClient, name)

def dying(*arguments, **options):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return method(*arguments, **options)

setattr(mlflow.MlflowClient, name, dying)
rollback("demo-awq", uri, load_trusted_keys([Path(public)]))
"""


@pytest.mark.parametrize(
    ("step", "call"),
    [
        ("set_registered_model_alias", "1"),
        ("set_registered_model_alias", "2"),
        ("set_registered_model_tag", "2"),
    ],
)
def test_a_killed_rollback_is_finished_and_not_done_twice(
    uri: str, key: SigningKey, tmp_path: Path, step: str, call: str
) -> None:
    (tmp_path / "key.pub").write_bytes(key.public.pem())
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, step, call, uri, str(tmp_path / "key.pub")],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT), "MLFLOW_DISABLE_TELEMETRY": "true"},
        check=False,
    )
    assert killed.returncode == -9
    assert trail(uri)[-1].state == "begun"
    moved = rollback("demo-awq", uri, [key.public])
    assert (moved.finished, moved.version) == (True, "2")
    assert by_alias(uri) == {"candidate": "3", "champion": "2", "previous": "3"}
    assert [record.state for record in trail(uri)] == ["done"] * 4


def test_an_act_whose_version_is_gone_is_abandoned(uri: str, key: SigningKey) -> None:
    record = trail(uri)[-1]
    entry = record.entry.model_copy(update={"number": 4, "version": "7"})
    entry = entry.model_copy(update={"moves": (journal.AliasMove(alias="champion", before="3", after="7"),)})
    begun = journal.JournalRecord(state="begun", entry=entry)
    with connected(uri) as client:
        client.set_registered_model_tag("demo-awq", "slipway.journal.000004", begun.model_dump_json())
    assert rollback("demo-awq", uri, [key.public]).version == "2"
    assert [found.state for found in trail(uri)] == ["done", "done", "done", "abandoned", "done"]


def test_a_signed_rollback_brings_back_no_release_that_was_put_in_anothers_place(
    uri: str, key: SigningKey, tmp_path: Path
) -> None:
    policy = Policy((key.public,), signed_moves=True)
    oldest = next(version for version in current(uri, "demo-awq") if version.version == "1")
    with connected(uri) as client:
        client.set_model_version_tag("demo-awq", "2", MANIFEST_TAG, oldest.manifest_digest)
    with pytest.raises(PromotionError, match="the version was replaced"):
        rollback("demo-awq", uri, policy, key=key)
    with connected(uri) as client:
        for number in (1, 2):
            client.delete_registered_model_tag("demo-awq", f"slipway.journal.{number:06}")
    for trusted in (policy, [key.public]):
        with pytest.raises(PromotionError, match="entry 1 of the audit trail is missing"):
            rollback("demo-awq", uri, trusted, key=key)
        with pytest.raises(PromotionError, match="entry 1 of the audit trail is missing"):
            canary("demo-awq", "1", 10, uri, trusted, key=key)
    with pytest.raises(PullError, match="entry 1 of the audit trail is missing"):
        pull("demo-awq@v2", tmp_path / "out", tracking_uri=uri, trusted_keys=policy)
    assert by_alias(uri) == {"candidate": "3", "champion": "3", "previous": "2"}
    told: list[str] = []
    promote_version("demo-awq", "3", uri, policy, key=key, progress=told.append)
    assert any("the trail begins anew, and version 3 is sha256:" in line for line in told)
    assert by_alias(uri) == {"candidate": "3", "champion": "3"}, "there is no way back to what nobody vouches for"
    assert pull("demo-awq", tmp_path / "out", tracking_uri=uri, trusted_keys=policy).version == "3"


def test_a_champion_that_something_else_assigned_does_not_become_previous(
    uri: str, store: Path, key: SigningKey
) -> None:
    policy = Policy((key.public,), signed_moves=True)
    point(uri, "champion", "1")
    promote_version("demo-awq", "2", uri, policy, key=key)
    assert by_alias(uri) == {"candidate": "3", "champion": "2", "previous": "3"}


def test_serve_and_pull_mean_the_same_version(uri: str, key: SigningKey, tmp_path: Path) -> None:
    (tmp_path / "release.pub").write_bytes(key.public.pem())
    (tmp_path / "policy.toml").write_text('[signers]\nkeys = ["release.pub"]\nsigned_moves = true\n')
    settings = replace(Settings.read(), tracking_uri=uri, policy=tmp_path / "policy.toml")
    served = desired_releases("demo-awq", "champion", settings, 2)
    assert [(each.version, each.weight) for each in served] == [("3", 100)]
    for junk in ('{"version":"1","weight":100}', "junk", '["1"]', '{"weight":"all"}', "{" * 5000):
        with connected(uri) as client:
            client.set_registered_model_tag("demo-awq", journal.WEIGHT_TAG, junk)
        served = desired_releases("demo-awq", "champion", settings, 2)
        assert [(each.version, each.weight) for each in served] == [("3", 100)]
    canary("demo-awq", "1", 10, uri, Policy.load(tmp_path / "policy.toml"), key=key)
    with connected(uri) as client:
        client.set_registered_model_tag("demo-awq", journal.WEIGHT_TAG, '{"version":"1","weight":100}')
    served = desired_releases("demo-awq", "champion", settings, 2)
    shares = [(each.version, each.weight, each.replicas) for each in served]
    assert shares == [("3", 90, 2), ("1", 10, 1)]
    point(uri, "champion", "2")
    with pytest.raises(PullError, match="the audit trail says 3: it was not moved by Slipway"):
        desired_releases("demo-awq", "champion", settings, 2)
    with pytest.raises(RescanError, match="it was not moved by Slipway"):
        rescan(settings, ["demo-awq"], lambda _: None)
    with pytest.raises(PullError, match="it was not moved by Slipway"):
        gather("demo-awq", settings)
