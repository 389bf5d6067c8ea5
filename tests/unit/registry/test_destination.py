"""A half-finished folder is gone on with only where it is this user's own: everybody can tell its name in advance."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from registry import destination
from registry.destination import folder_beside

DIGEST = "sha256:" + "a" * 64
PART = f".there.part-{'a' * 16}"


def quiet(_: str) -> None:
    pass


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder such as /tmp: everybody may write there, and remove what is theirs."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside"
    path.mkdir()
    (path / "file").write_text("kept")
    return path


def test_what_a_killed_pull_left_is_gone_on_with(shared: Path) -> None:
    (shared / PART / "release").mkdir(parents=True)
    (shared / PART).chmod(0o700)
    (shared / PART / "release" / "manifest.json").write_text("half")
    with folder_beside(shared / "there", DIGEST, quiet) as part:
        assert (part / "release" / "manifest.json").read_text() == "half"


def test_a_link_in_the_folders_place_is_not_followed(shared: Path, outside: Path) -> None:
    (shared / PART).symlink_to(outside)
    with folder_beside(shared / "there", DIGEST, quiet) as part:
        assert not part.is_symlink()
        assert list(part.iterdir()) == []
    assert (outside / "file").read_text() == "kept"


@pytest.mark.parametrize("place", ["release", "model.safetensors"])
def test_a_folder_that_holds_links_is_begun_anew(shared: Path, outside: Path, place: str) -> None:
    (shared / PART).mkdir(mode=0o700)
    (shared / PART / place).symlink_to(outside if place == "release" else outside / "file")
    with folder_beside(shared / "there", DIGEST, quiet) as part:
        assert list(part.iterdir()) == []
    assert (outside / "file").read_text() == "kept"


def test_a_folder_that_others_may_write_to_is_begun_anew(shared: Path) -> None:
    (shared / PART).mkdir()
    (shared / PART).chmod(0o777)
    (shared / PART / "model.safetensors").write_text("planted")
    with folder_beside(shared / "there", DIGEST, quiet) as part:
        assert list(part.iterdir()) == []
        assert part.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("below", [".", "release", "empty", "model.safetensors"])
def test_nothing_of_another_user_is_adopted(shared: Path, monkeypatch: pytest.MonkeyPatch, below: str) -> None:
    (shared / PART / "release").mkdir(parents=True)
    (shared / PART / "empty").mkdir()
    (shared / PART).chmod(0o700)
    for name in ("release/manifest.json", "model.safetensors"):
        (shared / PART / name).write_text("planted")
    if os.geteuid() == 0:
        os.chown(shared / PART / below, 65534, 65534)
    else:
        monkeypatch.setattr(destination.os, "geteuid", lambda: 65534)
    with folder_beside(shared / "there", DIGEST, quiet) as part:
        assert list(part.iterdir()) == []


def test_where_anothers_folder_can_not_be_removed_another_name_is_used(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a sticky folder, where only its owner may remove it."""
    (shared / PART).mkdir()
    (shared / PART).chmod(0o777)
    monkeypatch.setattr(destination.shutil, "rmtree", lambda *_, **__: None)
    with folder_beside(shared / "there", DIGEST, quiet) as part:
        assert part != shared / PART
        assert part.name.startswith(PART)
        (part / "file").write_text("ours")
    assert list((shared / PART).iterdir()) == []
