"""Pulling from a registry in a file: what is not what was signed is refused, and the destination stays as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from mlflow_tables import write_tables
from release_folder import make_release

from registry.backend import Line, Version
from registry.catalog import version
from registry.cold_files import MARKER
from registry.download import local, pause
from registry.errors import (
    ArgumentError,
    PromotionError,
    PullError,
    RegistryError,
    TrackingError,
    VariantError,
    VerificationError,
)
from registry.manifest import MANIFEST, SIGNATURE, Manifest
from registry.objects import ObjectStore
from registry.policy import Policy
from registry.promote import _Release
from registry.pull import fetch_file, pull, read_metadata
from registry.signing import SigningKey
from registry.stored import verify_stored
from registry.tiers import cool, warm
from registry.verify import verify, verify_documents
from registry.version_files import LocalArtifacts, fetch

if TYPE_CHECKING:
    from mlflow import MlflowClient


@pytest.fixture
def registered(release: Path, tmp_path: Path) -> str:
    """A registry in which the release is version 1, and champion."""
    return register(release, tmp_path)


def register(release: Path, tmp_path: Path, name: str = "demo-awq") -> str:
    digest = Manifest.parse((release / MANIFEST).read_bytes()).digest
    return write_tables(tmp_path / "mlflow.db", Line(name, {"champion": "1"}, {}), {"1": digest}, str(release))


def stored(uri: str, name: str = "demo-awq") -> Version:
    found = version(uri, name, "1")
    assert found is not None
    return found


def test_a_variant_that_the_release_does_not_list_is_refused_before_anything_is_fetched(
    signing_key: SigningKey, tmp_path: Path
) -> None:
    make_release(tmp_path / "release", signing_key, variants={"short": ["--max-model-len", "512"]})
    uri, place = register(tmp_path / "release", tmp_path), tmp_path / "pulled" / "demo"
    given: dict[str, Any] = {"tracking_uri": uri, "trusted_keys": [signing_key.public]}
    with pytest.raises(VariantError, match=r"does not list the variant `long`.*it lists `short`"):
        pull("demo-awq", place, variant="long", **given)
    assert not place.exists()
    assert not pull("demo-awq", place, variant="short", **given).already_there
    assert pull("demo-awq", place, variant="short", **given).already_there
    for replace in (False, True):  # what is there already is no reason to start another variant
        with pytest.raises(VariantError, match="`long`"):
            pull("demo-awq", place, variant="long", replace=replace, **given)


def test_the_first_releases_list_no_variant(release: Path, registered: str, signing_key: SigningKey) -> None:
    with pytest.raises(VariantError, match="it lists none"):
        pull(
            "demo-awq", release.parent / "new", variant="long", tracking_uri=registered,
            trusted_keys=[signing_key.public],
        )  # fmt: skip


def change(release: Path) -> None:
    """Let a file have other bytes, and the same size."""
    file = release / "config.json"
    file.write_bytes(file.read_bytes().swapcase())


def add(release: Path) -> None:
    (release / "more").write_text("")


def take_signature(release: Path) -> None:
    (release / SIGNATURE).unlink()


def link(release: Path) -> None:
    (release / "config.json").rename(release.parent / "config.json")
    (release / "config.json").symlink_to(release.parent / "config.json")


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (change, VerificationError, r"`demo-awq version 1` is not the release that was signed: config\.json: changed"),
        (add, PullError, "is not what was signed: `more` is extra"),
        (take_signature, PullError, f"has no `{SIGNATURE}`"),
        (link, RegistryError, r"config\.json"),
    ],
)
def test_what_is_stored_and_was_not_signed_is_refused_by_all_who_read_it(
    release: Path,
    registered: str,
    signing_key: SigningKey,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    error: type[Exception],
    words: str,
) -> None:
    known, place = [signing_key.public], tmp_path / "pulled" / "demo"
    assert pull("demo-awq", place, tracking_uri=registered, trusted_keys=known).version == "1"
    verify_stored(stored(registered), registered, known)
    spoil(release)
    for act in (
        lambda: pull("demo-awq", tmp_path / "new" / "demo", tracking_uri=registered, trusted_keys=known),
        lambda: verify_stored(stored(registered), registered, known),
    ):
        with pytest.raises(error, match=words):
            act()
    assert not (tmp_path / "new").exists()


def test_a_release_is_pulled_by_its_own_name_and_as_slipway_registered_it(
    release: Path, tmp_path: Path, signing_key: SigningKey
) -> None:
    known = [signing_key.public]
    uri = register(release, tmp_path, "other-awq")
    with pytest.raises(PullError, match="registered as `other-awq` holds the release `demo-awq`"):
        verify_stored(stored(uri, "other-awq"), uri, known)
    uri = write_tables(tmp_path / "mlflow.db", Line("demo-awq", {"champion": "1"}, {}), {"1": "x"}, str(release))
    for act in (
        lambda: verify_stored(stored(uri), uri, known),
        lambda: pull("demo-awq", tmp_path / "new", tracking_uri=uri, trusted_keys=known),
    ):
        with pytest.raises(PullError, match="was not registered by Slipway"):
            act()


def test_a_destination_that_is_taken_stays_as_it_is(registered: str, signing_key: SigningKey, tmp_path: Path) -> None:
    known, other = [signing_key.public], tmp_path / "other"
    make_release(other, signing_key, created="2026-11-25T01:02:03Z")
    before = (other / MANIFEST).read_bytes()
    with pytest.raises(PullError, match="exists and holds another release"):
        pull("demo-awq", other, tracking_uri=registered, trusted_keys=known)
    change(other)
    with pytest.raises(PullError, match="exists and is not this release"):
        pull("demo-awq", other, tracking_uri=registered, trusted_keys=known)
    assert (other / MANIFEST).read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("own")
    with pytest.raises(ArgumentError, match="exists and is not a release"):
        pull("demo-awq", tmp_path / "mine", tracking_uri=registered, trusted_keys=known, replace=True)
    assert (tmp_path / "mine" / "thesis").read_text() == "own"


def test_one_file_of_a_release_is_one_that_it_has(registered: str, signing_key: SigningKey, tmp_path: Path) -> None:
    known = [signing_key.public]
    with pytest.raises(PullError, match=r"has no file `config\.jso`: did you mean `config\.json`"):
        fetch_file("demo-awq", "config.jso", tmp_path / "x", tracking_uri=registered, trusted_keys=known)
    assert not (tmp_path / "x").exists()
    assert list(read_metadata("demo-awq", ["config.json", "y"], tracking_uri=registered, trusted_keys=known).files) == [
        "config.json"
    ]


def test_a_folder_is_told_from_the_release_by_its_sizes(release: Path, signing_key: SigningKey) -> None:
    policy, digest = Policy((signing_key.public,)), Manifest.parse((release / MANIFEST).read_bytes()).digest
    assert verify_documents(release, policy, digest).manifest_digest == digest
    with pytest.raises(VerificationError, match="as expected"):
        verify_documents(release, policy, f"sha256:{'0' * 64}")
    add(release)
    with pytest.raises(VerificationError, match="other files, or of other sizes"):
        verify_documents(release, policy, digest)


def test_what_was_uploaded_is_held_to_what_was_signed(
    release: Path, registered: str, signing_key: SigningKey, tmp_path: Path
) -> None:
    report = verify(release, [signing_key.public])
    make_release(tmp_path / "uploaded", signing_key)
    mine = _Release(cast("MlflowClient", None), registered, release, report, print)
    mine.check(str(release), "what was uploaded")
    change(tmp_path / "uploaded")
    with pytest.raises(PromotionError, match=r"not promoted: what was uploaded is not what was signed: .*config\.json"):
        mine.check(str(tmp_path / "uploaded"), "what was uploaded")


class Damaged:
    """An S3 client in whose bucket each object has the right size and other bytes."""

    def head_object(self, **_: str) -> dict[str, int]:
        return {"ContentLength": len("{}")}

    def get_object(self, **_: str) -> dict[str, Damaged]:
        return {"Body": self}

    def upload_file(self, *_: str) -> None:
        """Say that it went well."""

    def iter_chunks(self, _: int) -> list[bytes]:
        return [b"[]"]

    def download_file(self, bucket: str, key: str, target: str) -> None:
        assert bucket
        assert key
        Path(target).write_bytes(b"[]")


def test_a_damaged_object_is_neither_taken_for_stored_nor_fetched(release: Path, registered: str) -> None:
    bucket = ObjectStore("s3://bucket", Damaged())
    file = release / "small.json"
    file.write_text("{}")
    record = Manifest.parse((release / MANIFEST).read_bytes()).files["config.json"].model_copy(update={"size": 2})
    with pytest.raises(TrackingError, match="differs from the file that was uploaded: nothing was removed here"):
        bucket.put(file, record)
    with pytest.raises(TrackingError, match="does not have the SHA-256 in its name: it is damaged"):
        bucket.get(record, release / "new")
    assert not list(release.glob("new*"))
    before = (release / "config.json").read_bytes()
    with pytest.raises(TrackingError, match="differs from the file that was uploaded"):
        cool(stored(registered), bucket, print, least=1)
    assert (release / "config.json").read_bytes() == before


def test_only_what_was_registered_and_is_whole_is_put_away(release: Path, registered: str, tmp_path: Path) -> None:
    bucket = ObjectStore("s3://bucket", Damaged())
    own = stored(registered)
    change(release)
    with pytest.raises(TrackingError, match="differs from the manifest: it is not moved"):
        cool(own, bucket, print, least=1)
    manifest = release / MANIFEST
    manifest.write_text(manifest.read_text().replace("2026-11-24T", "2026-11-25T"))
    with pytest.raises(TrackingError, match=r"is not what was registered|no readable manifest"):
        cool(own, bucket, print, least=1)
    manifest.unlink()
    with pytest.raises(TrackingError, match="has no readable manifest"):
        cool(own, bucket, print, least=1)
    for location in (str(tmp_path / "gone"), "s3://bucket/x"):
        elsewhere = Version(own.name, "1", (), own.tags, location, own.created)
        with pytest.raises(TrackingError, match="is not in a folder of this machine"):
            warm(elsewhere, bucket, print)
    assert not (release.parent / MARKER).exists()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="can't be read: No such file"), local(tmp_path / "gone", 0):
        pass
    with pytest.raises(TrackingError, match="`x` can't be fetched: it broke"):
        pause("x", 99, "it broke")
    (tmp_path / "large").write_text(json.dumps("x" * 100))
    with pytest.raises(TrackingError, match="`large` is larger than 50 bytes"):
        fetch(LocalArtifacts(tmp_path), "large", tmp_path / "target", 50)
    assert not (tmp_path / "target").exists()
