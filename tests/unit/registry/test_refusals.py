"""Small checks that no larger story needs: addresses, metrics and stores that are none, aliases that are not meant."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import cast

import pytest
from pydantic import ValidationError

from registry import catalog, journal, untrusted
from registry.__main__ import FAILED, main
from registry.backend import Line, RegistryBackend, Version
from registry.embedded import pages
from registry.errors import NotFoundError, PromotionError, PullError, TrackingError, UntrustedFileError
from registry.journal import PAYLOAD_TYPE, JournalEntry
from registry.objects import ObjectStore, digest_local
from registry.policy import Policy
from registry.promotion_lock import PromotionLock, _Ticket, hold_promotion_lock
from registry.pull import pull
from registry.resolve import AuditMismatchError, resolve, resolve_alias
from registry.server import MlflowServer
from registry.signing import SigningKey
from registry.tracking import prepare, reach
from registry.verdict import Verdict


@pytest.mark.parametrize("port", ["99999", "x"])
def test_an_address_with_a_port_that_is_none_is_named(port: str) -> None:
    with pytest.raises(TrackingError, match=r"`MLFLOW_TRACKING_URI` is http://mlflow\.invalid:"):
        reach(f"http://ann:word@mlflow.invalid:{port}")


def test_a_server_that_nobody_runs_is_said_within_seconds() -> None:
    with pytest.raises(TrackingError, match=r"no MLflow server answers at http://127\.0\.0\.1:9"):
        MlflowServer("http://ann:word@127.0.0.1:9")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["metrics", "limits"])
def test_a_metric_that_is_no_number_is_refused(value: float, where: str) -> None:
    with pytest.raises(ValidationError, match="leave out a metric that could not be measured"):
        Verdict.model_validate({"gate": "load", "status": "pass", "reason": "r", where: {"p95": value}})


@pytest.mark.parametrize("uri", ["file:///tmp", "s3://", "bucket/prefix", "https://s3.example.com/bucket"])
def test_what_is_no_object_store_is_refused(uri: str) -> None:
    with pytest.raises(TrackingError, match="is not an object store"):
        ObjectStore.opened(uri)


def test_a_file_that_cannot_be_read_has_no_digest(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="can't be read: No such file"):
        digest_local(tmp_path / "gone")


@pytest.mark.parametrize("reference", ["", "@", "a@", "a@b@c", "../a", "a b", "a:b", "a'b"])
def test_what_names_no_release_is_refused_before_anything_is_asked(reference: str, tmp_path: Path) -> None:
    with pytest.raises(PullError, match="names no release"):
        pull(reference, tmp_path / "out", tracking_uri="http://127.0.0.1:9", trusted_keys=[])


def test_a_line_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no release `demo-awq`"):
        resolve("demo-awq", "champion", f"sqlite:///{tmp_path}/none.db", Policy(()))


def test_without_signatures_an_alias_without_an_entry_is_taken_as_it_is_and_else_refused() -> None:
    line = Line("demo-awq", {"champion": "3"}, {})
    assert resolve_alias(line, "champion", Policy(())).version == "3"
    with pytest.raises(AuditMismatchError, match="no entry of the audit trail says so"):
        resolve_alias(line, "champion", Policy((), signed_moves=True))


def test_a_line_has_no_more_turns_for_a_ticket_that_is_gone() -> None:
    """Another promoter took its maker for dead."""

    class Empty:
        def versions(self, _: str) -> list[Version]:
            return []

    ticket = _Ticket(cast("RegistryBackend", Empty()), "slipway-turns.demo", "3")
    with pytest.raises(PromotionError, match="the promotion lock was lost"):
        ticket.check()
    with pytest.raises(PromotionError, match="another promoter took this one for dead"):
        ticket.wait(print)


def test_a_registry_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    uri = f"sqlite:///{tmp_path}/file/mlflow.db"
    with pytest.raises(TrackingError, match=r"`.*mlflow\.db` can't be made: "):
        prepare(uri)
    with pytest.raises(TrackingError, match=r"can't promote: `.*`: "), hold_promotion_lock(uri, "demo-awq", print):
        pass


def test_what_is_no_database_is_said_by_all_who_read_it(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("junk" * 1000)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for act in (
        lambda: catalog.current(uri, "demo-awq"),
        lambda: catalog.names(uri),
        lambda: catalog.line(uri, "demo-awq"),
        lambda: catalog.artifact_root(uri),
    ):
        with pytest.raises(TrackingError, match="can't be read as MLflow's database"):
            act()


def test_a_listing_that_comes_back_to_where_it_was_ends() -> None:
    class Page(list[int]):
        def __init__(self, token: str) -> None:
            super().__init__([1])
            self.token = token

    whole = iter([Page("a"), Page("b"), Page("")])
    assert pages(lambda **_: next(whole)) == [1, 1, 1]
    again = iter([Page("a"), Page("b"), Page("a"), Page("")])
    with pytest.raises(TrackingError, match="MLflow lists without end: stopped after 3"):
        pages(lambda **_: next(again))


def test_a_folder_without_end_is_not_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "MOST_ENTRIES", 3)
    monkeypatch.setattr(untrusted, "DEEPEST", 1)
    for number in range(3):
        (tmp_path / str(number)).write_text("")
    assert len(untrusted.plain_files(tmp_path)) == 3
    (tmp_path / "more").write_text("")
    with pytest.raises(UntrustedFileError, match="holds more than 3 entries"):
        untrusted.plain_files(tmp_path)
    (tmp_path / "deep" / "a" / "b" / "c").mkdir(parents=True)
    with pytest.raises(UntrustedFileError, match="is more than 1 folders deep"):
        untrusted.plain_files(tmp_path / "deep")


def test_a_file_that_is_longer_than_it_says_is_not_read_whole() -> None:
    with pytest.raises(UntrustedFileError, match="has more than 10 bytes"):
        untrusted.read(Path(f"/proc/{os.getpid()}"), "status", 10)


def test_whoever_names_no_registry_is_asked_for_it(
    tmp_path: Path, signing_key: SigningKey, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "release.pub").write_bytes(signing_key.public.pem())
    assert main(["pull", "demo-awq", str(tmp_path / "out"), "--key", str(tmp_path / "release.pub")], {}) == FAILED
    assert "no MLflow address" in capsys.readouterr().err


def test_a_broken_trail_moves_no_alias(signing_key: SigningKey) -> None:
    document = {
        "state": "done",
        "entry": {
            "number": 2, "line": "demo-awq", "action": "promote", "version": "1", "digest": f"sha256:{'a' * 64}",
            "moves": [], "who": "ann", "when": "now", "why": "by hand", "prior": f"sha256:{'0' * 64}",
        },
    }  # fmt: skip
    entry = JournalEntry.model_validate(document["entry"])
    signature = base64.b64encode(signing_key.sign(entry.payload(), kind=PAYLOAD_TYPE).to_bytes()).decode()
    tags = {f"{journal.PREFIX}000002": json.dumps({**document, "signature": signature})}
    with pytest.raises(PromotionError, match="no alias of `demo-awq` was moved: entry 1 of the audit trail is missing"):
        journal.record_and_move(
            PromotionLock(), cast("RegistryBackend", None), Line("demo-awq", {}, tags), action="promote", version="1",
            digest="d",
            moves={}, who=None, why="w", key=None, trusted=[signing_key.public],
        )  # fmt: skip
