"""What is removed, and above all what is not."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import docker
import pytest
from image_record import image_record
from release_folder import make_release

from homes import make_home
from pipeline.operations import retention
from pipeline.operations.retention import kept_manifests
from pipeline.settings import Settings
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe, Store
from registry import journal, pull
from registry.catalog import current, line
from registry.promote import promote
from registry.retention import plan, remove
from registry.signing import SigningKey, load_or_create_key
from registry.tracking import connected, local_folder
from stages.synthetic_image import make_image

LATER = datetime.now(UTC) + timedelta(days=60)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> SigningKey:
    return load_or_create_key(tmp_path_factory.mktemp("keys") / "release.pem")


@pytest.fixture
def uri(tmp_path: Path, key: SigningKey) -> str:
    """Five versions: 5 is champion and candidate, 4 previous."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for number in range(5):
        make_release(tmp_path / f"release-{number}", key, created=f"2026-11-24T01:02:0{number}Z")
        promote(tmp_path / f"release-{number}", uri, [key.public])
    return uri


def test_what_nothing_refers_to_goes_with_its_files_and_the_rest_stays(
    uri: str, key: SigningKey, tmp_path: Path
) -> None:
    with connected(uri) as client:
        client.set_registered_model_alias("demo-awq", "pinned", "2")
    assert plan(uri) == []  # too young, too few
    assert plan(uri, keep=1, now=LATER) == plan(uri, keep=1, now=LATER)
    doomed = plan(uri, keep=1, now=LATER)
    assert [item.name for item in doomed] == ["demo-awq version 3", "demo-awq version 1"]
    assert all(item.bytes > 10_000 for item in doomed)
    folders = {version.version: local_folder(version.location) for version in current(uri, "demo-awq")}
    assert remove(doomed, uri) == doomed
    assert [version.version for version in current(uri, "demo-awq")] == ["5", "4", "2"]
    assert {number for number, folder in folders.items() if folder is not None and folder.exists()} == {"5", "4", "2"}
    found = line(uri, "demo-awq")
    assert found is not None
    assert len(journal.records(found)) == 5, "the audit trail stays"
    assert pull("demo-awq@previous", tmp_path / "out", tracking_uri=uri, trusted_keys=[key.public]).version == "4"
    assert remove(doomed, uri) == []


def test_what_is_referred_to_by_the_time_it_is_to_go_stays(uri: str, key: SigningKey) -> None:
    doomed = plan(uri, keep=1, now=LATER)
    with connected(uri) as client:
        client.set_registered_model_alias("demo-awq", "pinned", "3")
    found = line(uri, "demo-awq")
    assert found is not None
    begun = journal.records(found)[-1]
    entry = begun.entry.model_copy(
        update={"number": 6, "moves": (journal.AliasMove(alias="champion", before="5", after="1"),)}
    )
    with connected(uri) as client:
        record = journal.JournalRecord(state="begun", entry=entry)
        client.set_registered_model_tag("demo-awq", "slipway.journal.000006", record.model_dump_json())
    assert [item.name for item in remove(doomed, uri)] == ["demo-awq version 2"]


def test_an_upload_that_no_version_has_goes_and_one_that_two_have_stays(uri: str) -> None:
    third = next(version for version in current(uri, "demo-awq") if version.version == "3")
    second = next(version for version in current(uri, "demo-awq") if version.version == "2")
    with connected(uri) as client:
        client.delete_model_version("demo-awq", "3")  # as a removal that was killed after its first step
        client.create_registered_model("other")
        client.create_model_version("other", source=second.location)
    assert [item.kind for item in plan(uri)] == []  # an upload that is young may be somebody's at work
    doomed = plan(uri, keep=1, now=LATER)
    assert [item.kind for item in doomed] == ["version", "version", "upload"]
    assert doomed[2].bytes > 10_000
    assert remove(doomed, uri) == doomed
    folders = {version.version: local_folder(version.location) for version in (second, third)}
    assert {number for number, folder in folders.items() if folder is not None and folder.exists()} == {"2"}
    assert plan(uri, keep=1, now=LATER) == []
    with connected(uri) as client:
        client.delete_model_version("other", "1")
    (left,) = plan(uri, keep=1, now=LATER)
    assert remove([left], uri) == [left]
    assert folders["2"] is not None
    assert not folders["2"].exists()


def test_the_manifests_of_versions_that_stay_are_kept(uri: str) -> None:
    digests = {version.version: version.manifest_digest for version in current(uri, "demo-awq")}
    assert kept_manifests(uri, []) == set(digests.values())
    doomed = plan(uri, keep=1, now=LATER)
    assert kept_manifests(uri, doomed) == {digests["5"], digests["4"]}
    remove(doomed, uri)
    assert kept_manifests(uri, doomed) == {digests["5"], digests["4"]}


def test_images_go_that_no_artifact_that_stays_names_and_no_container_uses(
    engine: docker.DockerClient, machine: Settings, tmp_path: Path
) -> None:
    settings = Settings.read(make_home(tmp_path / "home", machine))
    store = Store(settings.home / "artifacts")
    told: list[str] = []
    names = ("runtime", "other-runtime", "kept", "gone", "used")
    ids = {name: make_image(engine, f"slipway-retention-{name}", {"etc/name": name}) for name in names}

    def put(name: str, runtime: str) -> Artifact:
        layers = [{"digest": f"sha256:{name}", "size": 7, "holds": "model config.json"}]
        named = {"image_id": ids[name], "tag": name, "runtime": runtime, "runtime_image_id": ids[runtime]}
        text = image_record(**named, layers=layers).model_dump_json()

        def make(draft: ArtifactDraft) -> None:
            (draft.folder / "image.json").write_text(text)

        return store.obtain(Recipe("image", inputs={}, parameters={}, code=name), make)

    kept, gone, used = put("kept", "runtime"), put("gone", "other-runtime"), put("used", "runtime")
    handle = settings.home / "dagster" / "handles" / "image" / "demo@awq.json"
    handle.parent.mkdir(parents=True)
    handle.write_text(json.dumps({"stage": "image", "key": kept.key}))
    container = engine.containers.create(ids["used"], ["/none"])
    try:
        doomed = retention.plan(settings, [], told.append, now=LATER)
        assert [(item.kind, item.name) for item in doomed] == [
            ("image", "gone"), ("image", "runtime other-runtime"), ("artifact", f"image {gone.key[:12]}")
        ]  # fmt: skip
        assert doomed[0].bytes == 7
        assert told == ["used stays: a container uses it"]
        there = {image.id for image in engine.images.list()}
        assert there >= set(ids.values())
        removed = retention.remove(doomed, settings, told.append)
        assert [item.name for item in removed] == [item.name for item in doomed], told
        there = {image.id for image in engine.images.list()}
        assert {name for name in names if ids[name] in there} == {"runtime", "kept", "used"}
        container.remove()
        doomed = retention.plan(settings, [], told.append, now=LATER)
        assert [item.name for item in doomed] == ["used", f"image {used.key[:12]}"]
        container = engine.containers.create(ids["used"], ["/none"])
        assert retention.remove(doomed, settings, told.append) == []
        assert told[-1].startswith("used stays: ")
    finally:
        with contextlib.suppress(docker.errors.NotFound):
            container.remove()
        for name in names:
            with contextlib.suppress(docker.errors.ImageNotFound):
                engine.images.remove(ids[name])


def test_cached_files_that_no_folder_shares_go(uri: str, key: SigningKey, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    pull("demo-awq", tmp_path / "one", tracking_uri=uri, trusted_keys=[key.public], cache=cache)
    assert plan(uri, cache=cache) == []
    (tmp_path / "one" / "config.json").unlink()
    (doomed,) = plan(uri, cache=cache)
    remove([doomed], uri)
    assert doomed.path is not None
    assert not doomed.path.exists()
