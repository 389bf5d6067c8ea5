from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from registry.atomic_write import create_atomically, write_atomically


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.json", "one")
    write_atomically(tmp_path / "a.json", b"two")
    assert (tmp_path / "a.json").read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text("before")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "a.json", "after")
    assert (tmp_path / "a.json").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("secret")
    (tmp_path / "a.json").symlink_to(tmp_path / "outside")
    write_atomically(tmp_path / "a.json", "new")
    assert (tmp_path / "outside").read_text() == "secret"
    assert not (tmp_path / "a.json").is_symlink()


def test_a_file_that_exists_is_not_created_again(tmp_path: Path) -> None:
    create_atomically(tmp_path / "key", "first", 0o600)
    create_atomically(tmp_path / "key", "second", 0o644)
    assert (tmp_path / "key").read_text() == "first"
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
