"""Homes that share what they make, through an S3-compatible storage."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import PlanError
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe
from pipeline.store.notes import SourceNotes
from pipeline.store.shared import SharedStore
from registry.errors import TrackingError
from registry.manifest import FileRecord
from registry.objects import ObjectStore

RECIPE = Recipe("quantized", inputs={"source": "sha256:aa"}, parameters={"bits": 4}, code="1", pins="sha256:bb")
NOTE = f"artifacts/quantized/{RECIPE.key}.json"
WEIGHTS = b"abc" * 1000


@dataclass
class Home:
    """A home of its own: what it had to make, and what it was told."""

    folder: Path
    uri: str
    made: int = 0
    told: list[str] = field(default_factory=list)

    def obtain(self, recipe: Recipe = RECIPE, floor: int = 0) -> Artifact:
        return SharedStore(self.folder, floor, self.uri, self.told.append).obtain(recipe, self._fill)

    def _fill(self, draft: ArtifactDraft) -> None:
        self.made += 1
        (draft.folder / "sub").mkdir()
        (draft.folder / "sub" / "weights").write_bytes(WEIGHTS)
        (draft.folder / "config.json").write_text("{}")
        draft.worker_seconds.append(2.0)
        draft.note(SourceNotes(revision="0" * 40))


@pytest.fixture
def homes(store: ObjectStore, tmp_path: Path) -> tuple[Home, Home]:
    return Home(tmp_path / "one", store.uri), Home(tmp_path / "other", store.uri)


def names(store: ObjectStore) -> set[str]:
    bucket, prefix = store.place("x")
    root = prefix.removesuffix("sha256/x")
    listed = store.client.list_objects_v2(Bucket=bucket, Prefix=root).get("Contents", [])
    return {found["Key"].removeprefix(root).split("/")[0] for found in listed}


def test_what_one_home_made_another_fetches(homes: tuple[Home, Home]) -> None:
    one, other = homes
    first, second = one.obtain(), other.obtain()
    assert (one.made, other.made) == (1, 0)
    assert second.digest == first.digest
    assert (second.files, second.inputs, second.notes) == (first.files, first.inputs, first.notes)
    weights = second.folder / "sub" / "weights"
    assert weights.read_bytes() == WEIGHTS
    assert weights.stat().st_mode & 0o777 == 0o444
    assert (first.worker_seconds, second.worker_seconds) == (2.0, 0.0)
    assert "fetching" in other.told[0]
    assert other.obtain().cached


def test_another_recipe_is_another_artifact_and_the_same_content_lies_there_once(
    homes: tuple[Home, Home], store: ObjectStore
) -> None:
    one, other = homes
    one.obtain()
    other.obtain(replace(RECIPE, code="2"))
    assert other.made == 1
    bucket, prefix = store.place("")
    contents = store.client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
    assert len(contents) == 2


@pytest.mark.parametrize(
    ("recipe", "shared"),
    [
        (replace(RECIPE, stage="answers", parameters={"engine": {"device": "NVIDIA H100"}}), True),
        (replace(RECIPE, stage="answers", parameters={"engine": {"device": "cpu"}}), False),
        *((replace(RECIPE, stage=stage), stage in {"source", "layers"})
          for stage in ("source", "layers", "image", "scan", "load", "release")),
    ],
    ids=lambda value: value.stage if isinstance(value, Recipe) else "",
)  # fmt: skip
def test_what_is_of_the_machine_it_was_made_on_is_made_on_each(
    homes: tuple[Home, Home], recipe: Recipe, *, shared: bool
) -> None:
    one, other = homes
    one.obtain(recipe)
    other.obtain(recipe)
    assert (one.made, other.made) == (1, 0 if shared else 1)


def test_a_storage_that_is_away_stops_nothing(homes: tuple[Home, Home], monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = homes
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    made = one.obtain()
    assert made.folder.is_dir()
    assert [line.split(":")[0] for line in one.told if "127.0.0.1:9" in line] == [
        "the shared artifact can't be fetched, making it here", "the artifact can't be shared",
    ]  # fmt: skip


def test_an_address_that_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="expected s3://BUCKET/PREFIX"):
        Home(tmp_path, "http://storage").obtain()


def damage(store: ObjectStore, sha256: str) -> None:
    bucket, key = store.place(sha256)
    store.client.put_object(Bucket=bucket, Key=key, Body=b"x" * len(WEIGHTS))


def lose(store: ObjectStore, sha256: str) -> None:
    bucket, key = store.place(sha256)
    store.client.delete_object(Bucket=bucket, Key=key)


@pytest.mark.parametrize("harm", [damage, lose])
def test_what_is_damaged_or_lost_there_is_made_here_and_mended(
    homes: tuple[Home, Home],
    store: ObjectStore,
    tmp_path: Path,
    harm: Any,  # noqa: ANN401
) -> None:
    one, other = homes
    first = one.obtain()
    harm(store, first.files["sub/weights"].sha256)
    second = other.obtain()
    assert (other.made, second.digest) == (1, first.digest)
    assert other.told[1].startswith("the shared artifact can't be fetched")
    assert list((other.folder / ".making").iterdir()) == []
    third = Home(tmp_path / "third", store.uri)
    assert (third.obtain().digest, third.made) == (first.digest, 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda note: note["files"].update({"../../escaped": note["files"]["config.json"]}),
        lambda note: note["files"].update({"/etc/escaped": note["files"]["config.json"]}),
        lambda note: note.pop("files"),
    ],
    ids=["upwards", "absolute", "no record"],
)
def test_a_record_that_leads_elsewhere_is_not_followed(
    homes: tuple[Home, Home],
    store: ObjectStore,
    tmp_path: Path,
    change: Any,  # noqa: ANN401
) -> None:
    one, other = homes
    one.obtain()
    note = json.loads(store.noted(NOTE) or "")
    change(note)
    store.note(NOTE, json.dumps(note))
    other.obtain()
    assert other.made == 1
    assert not list(tmp_path.rglob("escaped"))


def test_an_artifact_is_there_once_all_of_it_is(
    homes: tuple[Home, Home], store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = homes

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(ObjectStore, "note", dies)
        with pytest.raises(KeyboardInterrupt):
            one.obtain()
    assert names(store) == {"sha256"}
    assert one.obtain().cached
    other.obtain()
    assert other.made == 1
    assert names(store) == {"artifacts", "sha256"}


def test_a_fetch_that_is_interrupted_leaves_nothing_half_made(
    homes: tuple[Home, Home], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = homes
    one.obtain()
    get = ObjectStore.get

    def interrupted(self: ObjectStore, record: FileRecord, target: Path) -> None:
        get(self, record, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(ObjectStore, "get", interrupted)
        with pytest.raises(KeyboardInterrupt):
            other.obtain()
    assert list((other.folder / ".making").iterdir()) == []
    other.obtain()
    assert other.made == 0


def test_nothing_is_fetched_onto_a_disk_that_is_full(homes: tuple[Home, Home]) -> None:
    one, other = homes
    one.obtain()
    with pytest.raises(PlanError, match="must stay free"):
        other.obtain(floor=2**60)
