"""What lies beside a version's folder is anybody's: `cold.json` decides no path, and a tag is no digest by itself."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest

from registry.backend import MANIFEST_TAG, Version
from registry.cold_files import MARKER, SCHEMA, cold_files
from registry.errors import PullError, TrackingError, UntrustedFileError
from registry.manifest import MANIFEST, FileRecord, Manifest
from registry.objects import ObjectStore
from registry.pull import pull
from registry.tiers import warm
from registry.version_files import LocalArtifacts

RECORD = {"sha256": "0" * 64, "size": 3}


class Bucket(ObjectStore):
    """Gives the same bytes under every name, without a network."""

    def get(self, record: FileRecord, target: Path) -> None:
        assert record
        target.write_bytes(b"bad")


def mark(folder: Path, files: Mapping[str, object], store: object = "s3://bucket/prefix") -> None:
    document = {"schema": SCHEMA, "store": store, "files": files}
    (folder.parent / MARKER).write_text(json.dumps(document))


def version(folder: Path) -> Version:
    manifest = Manifest.parse((folder / MANIFEST).read_bytes())
    return Version("demo-awq", "1", (), {MANIFEST_TAG: manifest.digest}, folder.as_uri(), datetime.now(UTC))


@pytest.mark.parametrize("name", ["../../victim", "/victim", "a/../../victim", "release/manifest.json", "a\nb"])
def test_a_name_that_leads_out_of_the_folder_is_never_a_path(release: Path, name: str) -> None:
    mark(release, {name: RECORD})
    for act in (lambda: cold_files(release), LocalArtifacts(release).names):
        with pytest.raises(TrackingError, match=r"cold\.json"):
            act()


@pytest.mark.parametrize("record", [{"sha256": "../x", "size": 1}, {"sha256": "0" * 64}, "text", None])
def test_a_record_has_its_form(release: Path, record: object) -> None:
    mark(release, {"model.safetensors": record})
    with pytest.raises(TrackingError, match=r"cold\.json"):
        cold_files(release)


def test_only_what_the_manifest_says_is_brought_back(release: Path) -> None:
    mark(release, {"model-2.safetensors": RECORD})
    with pytest.raises(TrackingError, match="differs from the manifest"):
        warm(version(release), Bucket("s3://bucket/prefix", None), print)
    assert not (release / "model-2.safetensors").exists()


def test_a_file_is_not_brought_back_through_a_link(release: Path, tmp_path: Path) -> None:
    manifest = Manifest.parse((release / MANIFEST).read_bytes())
    name = next(name for name in manifest.files if name.startswith("release/evidence/"))
    mark(release, {name: manifest.files[name].model_dump()})
    outside = tmp_path / "outside"
    (release / "release" / "evidence").rename(outside)
    (release / "release" / "evidence").symlink_to(outside)
    (outside / Path(name).name).unlink()
    with pytest.raises(UntrustedFileError, match="is a link"):
        warm(version(release), Bucket("s3://bucket/prefix", None), print)
    assert not (outside / Path(name).name).exists()


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, '"text"'])
def test_a_marker_that_is_no_document_is_one_clear_error(release: Path, text: str) -> None:
    (release.parent / MARKER).write_text(text)
    with pytest.raises(TrackingError, match=r"cold\.json"):
        cold_files(release)


def test_a_marker_that_is_a_fifo_does_not_block(release: Path) -> None:
    os.mkfifo(release.parent / MARKER)
    with pytest.raises(TrackingError, match=r"cold\.json"):
        cold_files(release)


@pytest.mark.parametrize(
    "tag", ["sha256:../../victim", "sha256:" + "0" * 63, "/victim", "", "sha256:" + "0" * 64 + "\n"]
)
def test_a_tag_that_is_no_digest_is_none(tag: str) -> None:
    assert Version("demo-awq", "1", (), {MANIFEST_TAG: tag}, "", datetime.now(UTC)).manifest_digest is None


@pytest.mark.parametrize("name", ["..", ".", ".hidden"])
def test_a_name_that_is_a_folder_above_is_no_release(name: str, tmp_path: Path) -> None:
    with pytest.raises(PullError, match="names no release"):
        pull(name, tmp_path / "there", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", trusted_keys=[])
