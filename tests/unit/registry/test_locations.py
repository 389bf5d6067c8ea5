"""Locations are hints: only below the place where the registry keeps its files."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow_tables import write_tables

from registry.backend import Line
from registry.errors import PullError
from registry.locations import checked, checked_folder, within
from registry.tracking import local_folder


@pytest.mark.parametrize(
    ("location", "root"),
    [
        ("file:///home/artifacts/models/m-1/artifacts", "file:///home/artifacts"),
        ("/home/artifacts/models/m-1/artifacts", "file:///home/artifacts"),
        ("s3://bucket/prefix/models/m-1", "s3://bucket/prefix"),
        ("s3://bucket/prefix", "s3://bucket/prefix/"),
        ("s3://bucket/models", "s3://bucket"),
        ("wasbs://box@account.example/models", "wasbs://box@account.example"),
    ],
)
def test_what_lies_below_is_there(location: str, root: str) -> None:
    assert within(location, root)


@pytest.mark.parametrize(
    ("location", "root"),
    [
        ("file:///home/artifacts-2/models", "file:///home/artifacts"),
        ("file:///home/artifacts/../keys", "file:///home/artifacts"),
        ("file:///home/artifacts/%2e%2e/keys", "file:///home/artifacts"),
        ("file://host/home/artifacts/m", "file:///home/artifacts"),
        ("/", "/home/artifacts"),
        ("s3://bucket/prefix-2/m", "s3://bucket/prefix"),
        ("s3://bucket/prefix/../m", "s3://bucket/prefix"),
        ("s3://bucket/prefix/%2e%2e/m", "s3://bucket/prefix"),
        ("s3://other/prefix/m", "s3://bucket/prefix"),
        ("s3://user:password@bucket/prefix/m", "s3://bucket/prefix"),
        ("gs://bucket/prefix/m", "s3://bucket/prefix"),
        ("http://attacker.example/m", "s3://bucket/prefix"),
        ("s3://bucket/prefix/m", None),
        ("", "s3://bucket/prefix"),
    ],
)
def test_what_lies_elsewhere_is_not(location: str, root: str | None) -> None:
    assert not within(location, root)
    assert checked_folder(location, root) is None


def test_a_link_below_the_root_leads_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "root" / "models").mkdir(parents=True)
    (tmp_path / "keys").mkdir()
    (tmp_path / "root" / "m-1").symlink_to(tmp_path / "keys")
    assert within(str(tmp_path / "root" / "models"), tmp_path.as_uri() + "/root")
    assert not within(str(tmp_path / "root" / "m-1"), tmp_path.as_uri() + "/root")


@pytest.mark.parametrize("location", ["mlflow-artifacts:/2/models/m-1", "mlflow-artifacts://mlflow.example:5000/2/m-1"])
def test_what_the_server_hands_out_itself_is_taken_from_it(location: str) -> None:
    assert checked(location, "https://user:password@mlflow.example:5000") == location


@pytest.mark.parametrize(
    "location",
    ["mlflow-artifacts://attacker.example/2/m-1", "mlflow-artifacts:/../../m-1", "mlflow-artifacts:/%2e%2e/m"],
)
def test_another_hosts_files_are_not(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.locations.artifact_root", lambda _: "mlflow-artifacts:/2")
    with pytest.raises(PullError, match="outside its artifact store") as caught:
        checked(location, "https://user:password@mlflow.example:5000")
    assert "password" not in str(caught.value)


def test_an_experiment_that_keeps_files_at_a_foreign_web_server_gets_no_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("registry.locations.artifact_root", lambda _: "https://attacker.example/files")
    with pytest.raises(PullError, match="outside its artifact store"):
        checked("https://attacker.example/files/m-1", "https://user:password@mlflow.example:5000")


@pytest.mark.parametrize(
    "location",
    [
        "http://[::1",
        "mlflow-artifacts://[x/y",
        "s3://b\u2100/x",
        "file:///a\0b",
        "file:///a%00b",
        "file://[x/",
        "/\ud800",
    ],
)
def test_a_malformed_location_is_refused_in_one_line(location: str, tmp_path: Path) -> None:
    uri = write_tables(tmp_path / "mlflow.db", Line("demo-awq", {}, {}), {})
    for registry in (uri, "http://127.0.0.1:9"):
        with pytest.raises(PullError, match="not a valid URI or path"):
            checked(location, registry)
    assert not within(location, str(tmp_path))
    assert checked_folder(location, str(tmp_path)) is None
    assert local_folder(location) is None
