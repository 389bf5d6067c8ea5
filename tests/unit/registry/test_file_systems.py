"""File systems that this machine can't mount (Lustre, CIFS, gcsfuse): system calls are made to answer as theirs."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from pipeline.store.artifacts import ArtifactDraft, Recipe, Store
from registry import __main__ as command
from registry.destination import folder_beside, take_place
from registry.errors import FileSystemError
from registry.file_locks import flock
from registry.file_systems import set_mode, sync_folder

DIGEST = "sha256:" + "a" * 64


def answers(number: int) -> Callable[..., NoReturn]:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return refuse


def write(draft: ArtifactDraft) -> None:
    (draft.folder / "made.txt").write_text("made")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_home_without_locks_is_refused_with_the_reason(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", answers(number))
    with pytest.raises(FileSystemError, match=r"has no locks.*use a local disk") as caught:
        Store(tmp_path).obtain(Recipe("source", {}, {}, "code"), write)
    assert str(tmp_path) in str(caught.value)
    # Of the statuses, the one that says that trying again changes nothing.
    assert command.status_of(caught.value) == command.USAGE


def test_another_error_of_a_lock_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", answers(errno.EAGAIN))
    with (tmp_path / "lock").open("w") as stream, pytest.raises(BlockingIOError):
        flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_pull_goes_on_without_locks_and_touches_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / f".there.part-{'b' * 16}"
    (other / "of-another-pull").mkdir(parents=True)
    monkeypatch.setattr(fcntl, "flock", answers(errno.ENOSYS))
    lines: list[str] = []
    with folder_beside(tmp_path / "there", DIGEST, lines.append) as part:
        (part / "file").write_text("pulled")
        take_place(part, tmp_path / "there", replace=False)
    assert (tmp_path / "there" / "file").read_text() == "pulled"
    assert (other / "of-another-pull").is_dir()
    assert len(lines) == 1
    assert "has no locks" in lines[0]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_folder_that_cannot_be_synced_is_gone_on_with(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_dir():
            answers(number)()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    made = Store(tmp_path).obtain(Recipe("source", {}, {}, "code"), write)
    assert (made.folder / "made.txt").read_text() == "made"


def test_a_disk_that_fails_is_no_missing_feature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", answers(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)
    monkeypatch.setattr(os, "chmod", answers(errno.EROFS))
    with pytest.raises(OSError, match="Read-only"):
        set_mode(tmp_path, 0o755)


def test_a_file_whose_mode_cannot_be_set_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "chmod", answers(errno.EPERM))
    made = Store(tmp_path).obtain(Recipe("source", {}, {}, "code"), write)
    assert made.files.keys() == {"made.txt"}
