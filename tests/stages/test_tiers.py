"""Versions moved to S3-compatible storage and back: under load, interrupted anywhere, and with damage at either end."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import boto3
import pytest
from release_folder import make_release

from registry import pull, tiers
from registry.backend import Version
from registry.catalog import current
from registry.cold_files import cold_files
from registry.errors import RegistryError, TrackingError
from registry.objects import ObjectStore
from registry.promote import promote
from registry.signing import SigningKey, load_or_create_key
from registry.tiers import TierMove, carry_out, cool, plan_moves, warm
from registry.tracking import local_folder

LEAST = 1000
FILES = {
    "config.json": b"{}", "model.safetensors": os.urandom(300_000), "model-2.safetensors": os.urandom(200_000),
    **{f"release/evidence/{name}.json": b"{}" for name in ("drift", "scan", "load", "sbom.cdx")},
}  # fmt: skip


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> SigningKey:
    return load_or_create_key(tmp_path_factory.mktemp("keys") / "release.pem")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, key: SigningKey) -> str:
    """A line of three versions: 3 is champion, 2 what was before, 1 nobody's."""
    home = tmp_path_factory.mktemp("registry")
    for number in range(3):
        folder = home / f"release-{number}"
        make_release(folder, key, files=FILES, created=f"2026-11-24T01:02:0{number}Z")
        promote(folder, f"sqlite:///{home}/mlflow.db", [key.public], key=key)
    return f"sqlite:///{home}/mlflow.db"


@pytest.fixture
def uri(made: str, tmp_path: Path) -> Iterator[str]:
    """That line; its files are afterwards what they were: nothing else is changed by a move."""
    places = [folder_of(found).parent for found in current(made, "demo-awq")]
    for place in places:
        shutil.copytree(place, tmp_path / "kept" / place.name)
    yield made
    for place in places:
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "kept" / place.name, place)


def version(uri: str, number: str) -> Version:
    return next(found for found in current(uri, "demo-awq") if found.version == number)


def folder_of(found: Version) -> Path:
    folder = local_folder(found.location)
    assert folder is not None
    return folder


def pulled(uri: str, number: str, place: Path, key: SigningKey) -> dict[str, bytes]:
    pull(f"demo-awq@v{number}", place, tracking_uri=uri, trusted_keys=[key.public])
    return {name: (place / name).read_bytes() for name in FILES}


def test_a_cold_version_is_pulled_and_comes_back_to_the_byte(
    uri: str, store: ObjectStore, key: SigningKey, tmp_path: Path
) -> None:
    one = version(uri, "1")
    assert cool(one, store, print, LEAST) == 500_000
    assert not (folder_of(one) / "model.safetensors").exists()
    assert pulled(uri, "1", tmp_path / "cold", key) == FILES
    assert cool(one, store, print, LEAST) == 0
    assert warm(one, store, print) == 500_000
    assert cold_files(folder_of(one)) == ("", {})
    assert pulled(uri, "1", tmp_path / "hot", key) == FILES


def test_no_pull_fails_while_versions_move_to_and_fro(
    uri: str, store: ObjectStore, key: SigningKey, tmp_path: Path
) -> None:
    one, ended = version(uri, "1"), threading.Event()
    failures: list[Exception] = []
    counts = [0, 0]

    def puller(number: int) -> None:
        while not ended.is_set():
            place = tmp_path / f"{number}-{counts[number]}"
            try:
                assert pulled(uri, "1", place, key) == FILES
            except (RegistryError, AssertionError) as error:
                failures.append(error)
            shutil.rmtree(place, ignore_errors=True)
            counts[number] += 1

    pullers = [threading.Thread(target=puller, args=(number,)) for number in range(2)]
    for thread in pullers:
        thread.start()
    for _ in range(15):
        cool(one, store, lambda _: None, LEAST)
        warm(one, store, lambda _: None)
    ended.set()
    for thread in pullers:
        thread.join()
    assert failures == []
    assert sum(counts) > 10


class Killed(BaseException):
    """The process ended here."""


@pytest.mark.parametrize("step", ["second put", "mark", "after mark", "first unlink"])
def test_a_move_to_the_cold_that_is_cut_off_loses_nothing(
    uri: str, store: ObjectStore, key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    one, puts, unlinks = version(uri, "1"), [0], [0]
    mark, put, unlink = tiers.write_marker, ObjectStore.put, Path.unlink

    def counted_put(self: ObjectStore, *given: object) -> None:
        puts[0] += 1
        if step == "second put" and puts[0] == 2:
            raise Killed
        put(self, *given)  # type: ignore[arg-type]

    def cut_mark(*given: object) -> None:
        if step == "mark":
            raise Killed
        mark(*given)  # type: ignore[arg-type]
        if step == "after mark":
            raise Killed

    def cut_unlink(self: Path, *given: object, **named: bool) -> None:
        unlink(self, **named)
        if self.name.endswith(".safetensors"):
            unlinks[0] += 1
            if step == "first unlink" and unlinks[0] == 1:
                raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(ObjectStore, "put", counted_put)
        patched.setattr(tiers, "write_marker", cut_mark)
        patched.setattr(Path, "unlink", cut_unlink)
        with pytest.raises(Killed):
            cool(one, store, print, LEAST)
    assert pulled(uri, "1", tmp_path / "after", key) == FILES
    cool(one, store, print, LEAST)
    assert not (folder_of(one) / "model.safetensors").exists()
    assert pulled(uri, "1", tmp_path / "cold", key) == FILES


def test_a_move_back_that_is_cut_off_loses_nothing(
    uri: str, store: ObjectStore, key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, get = version(uri, "1"), ObjectStore.get
    cool(one, store, print, LEAST)
    gets = [0]

    def cut(self: ObjectStore, *given: object) -> None:
        gets[0] += 1
        if gets[0] == 2:
            raise Killed
        get(self, *given)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(ObjectStore, "get", cut)
        with pytest.raises(Killed):
            warm(one, store, print)
    assert pulled(uri, "1", tmp_path / "half", key) == FILES
    assert warm(one, store, print) > 0
    assert pulled(uri, "1", tmp_path / "whole", key) == FILES


def test_what_is_damaged_in_the_cold_is_found_both_ways(
    uri: str, store: ObjectStore, key: SigningKey, tmp_path: Path
) -> None:
    one = version(uri, "1")
    cool(one, store, print, LEAST)
    _, cold = cold_files(folder_of(one))
    bucket, place = store.place(cold["model.safetensors"].sha256)
    boto3.client("s3").put_object(Bucket=bucket, Key=place, Body=os.urandom(300_000))
    with pytest.raises(RegistryError):
        pulled(uri, "1", tmp_path / "pulled", key)
    assert not (tmp_path / "pulled").exists()
    with pytest.raises(TrackingError, match="damaged"):
        warm(one, store, print)
    # And a version that would share the damaged object is not moved onto it.
    with pytest.raises(TrackingError, match="nothing was removed"):
        cool(version(uri, "2"), store, print, LEAST)
    assert pulled(uri, "2", tmp_path / "two", key) == FILES


def test_what_is_damaged_here_is_not_moved(uri: str, store: ObjectStore) -> None:
    one = version(uri, "1")
    (folder_of(one) / "model.safetensors").write_bytes(b"other")
    with pytest.raises(TrackingError, match="differs from the manifest"):
        cool(one, store, print, LEAST)
    assert cold_files(folder_of(one)) == ("", {})


def planned(uri: str, **options: object) -> list[tuple[str, str]]:
    later = datetime.now(UTC) + timedelta(days=90)
    moves = plan_moves(uri, unused_for=timedelta(days=30), now=later, least=LEAST, **options)  # type: ignore[arg-type]
    return sorted((move.version.version, move.to) for move in moves)


def test_what_an_alias_needs_stays_and_comes_back_unless_it_is_allowed(uri: str, store: ObjectStore) -> None:
    assert planned(uri) == [("1", "cold")]
    assert planned(uri, aliased=True) == [("1", "cold"), ("2", "cold"), ("3", "cold")]
    assert plan_moves(uri, unused_for=timedelta(days=30), least=LEAST) == []
    cool(version(uri, "2"), store, print, LEAST)
    assert planned(uri) == [("1", "cold"), ("2", "hot")]
    moves = plan_moves(uri, unused_for=timedelta(), least=LEAST)
    made = carry_out(moves, uri, store, print, LEAST)
    assert sorted((move.version.version, move.to) for move in made) == [("1", "cold"), ("2", "hot")]
    assert (folder_of(version(uri, "2")) / "model.safetensors").exists()


def test_what_is_allowed_is_moved_with_its_alias(uri: str, store: ObjectStore) -> None:
    later = datetime.now(UTC) + timedelta(days=90)
    moves = plan_moves(uri, unused_for=timedelta(days=30), now=later, least=LEAST, aliased=True)
    made = carry_out(moves, uri, store, print, LEAST)
    assert sorted(move.version.version for move in made) == ["1", "2", "3"]
    assert not (folder_of(version(uri, "3")) / "model.safetensors").exists()
    assert {move.version.version: "no alias" in move.why for move in made} == {"1": True, "2": False, "3": False}


def test_files_that_another_store_has_move_to_the_new_one(
    uri: str, store: ObjectStore, key: SigningKey, tmp_path: Path
) -> None:
    one, new = version(uri, "1"), ObjectStore.opened(f"{store.uri}-new")
    cool(one, store, print, 250_000)
    assert not (folder_of(one) / "model.safetensors").exists()
    cool(one, new, print, LEAST)
    assert cold_files(folder_of(one))[0] == new.uri
    assert pulled(uri, "1", tmp_path / "cold", key) == FILES
    assert warm(one, store, print) == 500_000, "from where they are, whatever store is set now"


def test_a_larger_bound_forgets_no_file(uri: str, store: ObjectStore, key: SigningKey, tmp_path: Path) -> None:
    one = version(uri, "1")
    cool(one, store, print, LEAST)
    cool(one, store, print, 250_000)
    assert pulled(uri, "1", tmp_path / "cold", key) == FILES


def test_a_version_that_got_an_alias_since_the_plan_stays(uri: str, store: ObjectStore) -> None:
    stale = TierMove(version(uri, "3"), "cold", "last used long ago, no alias needs it here", 0)
    assert carry_out([stale], uri, store, print, LEAST) == []
    assert (folder_of(version(uri, "3")) / "model.safetensors").exists()
