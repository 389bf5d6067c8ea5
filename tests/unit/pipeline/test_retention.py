"""What `slipway gc` takes of a home, and above all what it leaves."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from image_record import image_record

from pipeline import cli
from pipeline.operations.retention import Leftover, plan, remove
from pipeline.settings import Settings
from pipeline.store.artifacts import FINISHED, Artifact, ArtifactDraft, Recipe, Store
from registry.file_locks import locked

LATER = datetime.now(UTC) + timedelta(days=2)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """An empty home, on a machine without an engine."""
    return Settings.read({"SLIPWAY_HOME": str(tmp_path / "home"), "DOCKER_HOST": f"unix://{tmp_path}/none.sock"})


@pytest.fixture
def store(settings: Settings) -> Store:
    return Store(settings.home / "artifacts")


def put(store: Store, stage: str, inputs: Mapping[str, Artifact], files: Mapping[str, str], code: str = "") -> Artifact:
    def make(draft: ArtifactDraft) -> None:
        for name, text in files.items():
            (draft.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (draft.folder / name).write_text(text)

    digests = {name: of.digest for name, of in inputs.items()}
    return store.obtain(Recipe(stage, digests, parameters={}, code=code or json.dumps(files)), make)


def released(store: Store, name: str) -> dict[str, Artifact]:
    """A release and what it is made of; of no two of them but the layers, which were not measured, hold the same."""
    source = put(store, "source", {}, {"weights": f"source of {name}"})
    quantized = put(store, "quantized", {"source": source}, {"weights": f"weights of {name}"})
    layers = put(store, "layers", {"quantized": quantized, "source": source}, {"layers.json": "[]"})
    answers = put(store, "answers", {"checkpoint": source}, {"answers": f"answers of {name}"})
    made_of = {"baseline": answers, "quantized": quantized, "layers": layers}
    drift = put(store, "drift", made_of, {"drift.json": f"drift of {name}"})
    made = {"source": source, "quantized": quantized, "drift": drift}
    release = put(store, "release", made, {"release/manifest.json": f"manifest of {name}"})
    return {**made, "layers": layers, "answers": answers, "release": release}


def manifest_of(release: Artifact) -> str:
    return f"sha256:{release.files['release/manifest.json'].sha256}"


def handled(settings: Settings, artifact: Artifact) -> None:
    handle = settings.home / "dagster" / "handles" / artifact.stage / "demo@awq.json"
    handle.parent.mkdir(parents=True)
    handle.write_text(json.dumps({"stage": artifact.stage, "key": artifact.key}))


def image_of(name: str) -> dict[str, str]:
    record = image_record(image_id=f"sha256:{name}", tag=f"slipway:{name}", runtime_image_id="sha256:r")
    return {"image.json": record.model_dump_json()}


def planned(settings: Settings, *manifests: str) -> list[Leftover]:
    return plan(settings, manifests, pytest.fail, now=LATER)


def places(leftovers: list[Leftover]) -> set[tuple[str, str] | None]:
    return {item.place for item in leftovers}


def test_what_a_registered_release_was_made_of_stays_and_the_rest_goes(settings: Settings, store: Store) -> None:
    kept, gone = released(store, "kept"), released(store, "gone")
    doomed = planned(settings, manifest_of(kept["release"]))
    assert places(doomed) == {(each.stage, each.key) for each in gone.values()}
    before = sorted(store.root.rglob("*"))
    assert planned(settings, manifest_of(kept["release"])) == doomed
    assert sorted(store.root.rglob("*")) == before, "a plan removes nothing"
    assert places(remove(doomed, settings, lambda _: None)) == places(doomed)
    assert [store.find(each.stage, each.key) for each in gone.values()] == [None] * len(gone)
    assert all(store.find(each.stage, each.key) for each in kept.values())
    assert planned(settings, manifest_of(kept["release"])) == []
    assert list((store.root / ".making").iterdir()) == []


def test_what_an_asset_last_produced_stays_with_what_it_was_made_of(settings: Settings, store: Store) -> None:
    made = released(store, "refused")
    handled(settings, made["drift"])
    assert places(planned(settings)) == {("release", made["release"].key)}


def test_what_is_young_stays_with_what_it_was_made_of(settings: Settings, store: Store) -> None:
    source = put(store, "source", {}, {"weights": "w"})
    quantized = put(store, "quantized", {"source": source}, {"weights": "q"})
    other = put(store, "quantized", {"source": source}, {"weights": "other"})
    for old in (source, other):
        written = old.folder.parent / "artifact.json"
        written.write_text(json.dumps({**json.loads(written.read_text()), "created": "2026-01-02T03:04:05+00:00"}))
    (doomed,) = plan(settings, [], pytest.fail)
    assert (doomed.kind, doomed.name) == ("artifact", f"quantized {other.key[:12]}")
    assert "made on 2026-01-02" in doomed.why
    remove([doomed], settings, lambda _: None)
    assert store.find("quantized", quantized.key)


def test_only_bytes_that_nothing_else_names_count_as_freed(settings: Settings, store: Store, tmp_path: Path) -> None:
    first = put(store, "quantized", {}, {"shared": "12345", "elsewhere": "123", "own": "12"})
    os.link(first.folder / "elsewhere", tmp_path / "registry")

    def link(draft: ArtifactDraft) -> None:
        os.link(first.folder / "shared", draft.folder / "shared")

    second = store.obtain(Recipe("release", {"quantized": first.digest}, parameters={}, code=""), link)
    records = [(made.folder.parent / "artifact.json").stat().st_size for made in (first, second)]
    freed = [records[0] + len("12"), records[1] + len("12345")]
    doomed = planned(settings)
    assert [item.name.split()[0] for item in doomed] == ["quantized", "release"]
    assert [item.bytes for item in doomed] == freed
    assert [item.bytes for item in remove(doomed, settings, lambda _: None)] == freed
    assert (tmp_path / "registry").read_text() == "123"


def test_an_artifact_that_somebody_is_making_is_left_and_told(settings: Settings, store: Store) -> None:
    held, other = put(store, "source", {}, {"weights": "1"}), put(store, "source", {}, {"weights": "2"})
    doomed = planned(settings)
    told: list[str] = []
    with locked(store.root / "source" / f"{held.key}.lock"):
        removed = remove(doomed, settings, told.append)
    assert places(removed) == {("source", other.key)}
    assert store.find("source", held.key)
    assert f"source {held.key[:12]} stays: another process is making it" in told


def test_what_is_half_made_is_not_looked_at(settings: Settings, store: Store) -> None:
    made = put(store, "source", {}, {"weights": "1"})
    beside = store.root / ".making" / "source-abc" / "artifact"
    beside.parent.mkdir(parents=True)
    (made.folder.parent).rename(beside)
    assert planned(settings) == []
    assert beside.exists()


def test_finished_layers_go_once_no_run_has_continued_with_them_for_a_day(settings: Settings, store: Store) -> None:
    recipe = Recipe("quantized", {}, {}, "1")

    def fail(draft: ArtifactDraft) -> None:
        (draft.scratch / FINISHED).mkdir()
        (draft.scratch / FINISHED / "layer-00000").write_text("12345")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        store.obtain(recipe, fail)
    assert plan(settings, [], print) == []
    doomed = planned(settings)
    assert [(item.kind, item.name, item.bytes) for item in doomed] == [
        ("unfinished", f"quantized {recipe.key[:12]}", 5)
    ]
    with locked(store.root / "quantized" / f"{recipe.key}.lock"):
        assert remove(doomed, settings, lambda _: None) == []
    assert [item.bytes for item in remove(doomed, settings, lambda _: None)] == [5]
    assert list((store.root / ".making").iterdir()) == []


def test_without_an_engine_images_and_their_artifacts_stay_and_the_rest_goes(settings: Settings, store: Store) -> None:
    image, source = put(store, "image", {}, image_of("1")), put(store, "source", {}, {"weights": "w"})
    told: list[str] = []
    doomed = plan(settings, [], told.append, now=LATER)
    assert places(doomed) == {("source", source.key)}
    (line,) = told
    assert line.startswith("images and the artifacts that name them stay: the container engine at")
    handled(settings, image)
    assert places(planned(settings)) == {("source", source.key)}, "nor is an engine asked where no image is to go"


def test_the_command_shows_what_would_go_and_removes_it_when_told_to(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = put(store, "source", {}, {"weights": "weights"})
    written = made.folder.parent / "artifact.json"
    written.chmod(stat.S_IRUSR | stat.S_IWUSR)
    written.write_text(json.dumps({**json.loads(written.read_text()), "created": "2026-01-02T03:04:05+00:00"}))
    monkeypatch.setenv("SLIPWAY_HOME", str(settings.home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    item = {
        "kind": "artifact", "name": f"source {made.key[:12]}", "bytes": written.stat().st_size + 7,
        "why": "no kept version and no last run uses it; made on 2026-01-02",
    }  # fmt: skip
    for words, removed in ((["gc", "--json"], False), (["gc", "--yes", "--json"], True)):
        done = CliRunner().invoke(cli.main, words)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout) == {"removed": removed, "items": [item]}
        assert (store.find("source", made.key) is None) == removed
