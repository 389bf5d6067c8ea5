"""Small checks that no larger story needs: addresses, metrics and stores that are none, aliases that are not meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from registry.backend import Line
from registry.errors import NotFoundError, PullError, TrackingError
from registry.objects import ObjectStore, digest_of
from registry.policy import Policy
from registry.pull import pull
from registry.resolve import UnexplainedError, meaning, resolve
from registry.server import Server
from registry.tracking import reach
from registry.verdict import Verdict


@pytest.mark.parametrize("port", ["99999", "x"])
def test_an_address_with_a_port_that_is_none_is_named(port: str) -> None:
    with pytest.raises(TrackingError, match=r"`MLFLOW_TRACKING_URI` is http://mlflow\.invalid:"):
        reach(f"http://ann:word@mlflow.invalid:{port}")


def test_a_server_that_nobody_runs_is_said_within_seconds() -> None:
    with pytest.raises(TrackingError, match=r"no MLflow server answers at http://127\.0\.0\.1:9"):
        Server("http://ann:word@127.0.0.1:9")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["metrics", "limits"])
def test_a_metric_that_is_no_number_is_refused(value: float, where: str) -> None:
    with pytest.raises(ValidationError, match="leave out a metric that could not be measured"):
        Verdict.model_validate({"gate": "load", "status": "pass", "reason": "r", where: {"p95": value}})


@pytest.mark.parametrize("uri", ["file:///tmp", "s3://", "bucket/prefix", "https://s3.example.com/bucket"])
def test_what_is_no_object_store_is_refused(uri: str) -> None:
    with pytest.raises(TrackingError, match="is no object store"):
        ObjectStore.opened(uri)


def test_a_file_that_cannot_be_read_has_no_digest(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="can't be read: No such file"):
        digest_of(tmp_path / "gone")


@pytest.mark.parametrize("reference", ["", "@", "a@", "a@b@c", "../a", "a b", "a:b", "a'b"])
def test_what_names_no_release_is_refused_before_anything_is_asked(reference: str, tmp_path: Path) -> None:
    with pytest.raises(PullError, match="names no release"):
        pull(reference, tmp_path / "out", tracking_uri="http://127.0.0.1:9", trusted_keys=[])


def test_a_line_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no release `demo-awq`"):
        resolve("demo-awq", "champion", f"sqlite:///{tmp_path}/none.db", Policy(()))


def test_without_signatures_an_alias_without_an_entry_is_taken_as_it_is_and_else_refused() -> None:
    line = Line("demo-awq", {"champion": "3"}, {})
    assert meaning(line, "champion", Policy(())).version == "3"
    with pytest.raises(UnexplainedError, match="no entry of the audit trail says so"):
        meaning(line, "champion", Policy((), signed_moves=True))
