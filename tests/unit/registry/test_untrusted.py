"""Files that somebody else left: only regular files of a bounded size, and never through a link."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from registry import untrusted
from registry.errors import UntrustedFileError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    (path / "deep" / "er").mkdir(parents=True)
    (path / "deep" / "er" / "file.txt").write_text("text")
    return path


def link(place: Path, outside: Path) -> None:
    place.symlink_to(outside)


def fifo(place: Path, _: Path) -> None:
    os.mkfifo(place)


def folder_of_that_name(place: Path, _: Path) -> None:
    place.mkdir()


def unix_socket(place: Path, _: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(place))


ODD = [link, fifo, folder_of_that_name, unix_socket]


def test_a_file_is_read_by_its_path_in_the_folder(folder: Path) -> None:
    assert untrusted.read(folder, "deep/er/file.txt", 4) == b"text"
    assert untrusted.plain_files(folder) == ["deep/er/file.txt"]
    with pytest.raises(FileNotFoundError):
        untrusted.read(folder, "deep/absent", 4)


@pytest.mark.parametrize("left", ODD)
def test_nothing_but_a_regular_file_is_read(folder: Path, outside: Path, left: Callable[[Path, Path], None]) -> None:
    left(folder / "odd", outside)
    with pytest.raises(UntrustedFileError, match="odd"):
        untrusted.read(folder, "odd", 100)


@pytest.mark.parametrize("left", [link, fifo, unix_socket])
def test_a_folder_with_anything_else_is_refused_and_it_is_named(
    folder: Path, outside: Path, left: Callable[[Path, Path], None]
) -> None:
    left(folder / "deep" / "odd", outside)
    with pytest.raises(UntrustedFileError, match="`deep/odd`"):
        untrusted.plain_files(folder)


def test_a_file_over_the_limit_is_not_read(folder: Path) -> None:
    with pytest.raises(UntrustedFileError, match="4 bytes: expected at most 3"):
        untrusted.read(folder, "deep/er/file.txt", 3)


def test_a_link_on_the_way_or_in_the_folders_place_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "way").symlink_to(folder / "deep")
    (tmp_path / "alias").symlink_to(folder)
    with pytest.raises(UntrustedFileError, match="way"):
        untrusted.read(folder, "way/er/file.txt", 100)
    with pytest.raises(UntrustedFileError, match="alias"):
        untrusted.read(tmp_path / "alias", "deep/er/file.txt", 100)
    with pytest.raises(UntrustedFileError, match="way"), untrusted.folder_handle(folder, within="way/new", make=True):
        pass
    assert not (folder / "deep" / "new").exists()


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/passwd", "deep/../../outside.txt", "a\0b"])
def test_a_name_that_leads_out_is_refused(folder: Path, outside: Path, name: str) -> None:
    assert outside.exists()
    with pytest.raises(UntrustedFileError, match="leads out"):
        untrusted.read(folder, name, 100)


@pytest.mark.parametrize("left", [link, fifo, unix_socket])
def test_a_new_file_takes_the_place_of_what_lies_there(
    folder: Path, outside: Path, left: Callable[[Path, Path], None]
) -> None:
    left(folder / "log", outside)
    with untrusted.create_file(folder, "log") as stream:
        stream.write(b"new")
    assert (folder / "log").read_bytes() == b"new"
    assert not (folder / "log").is_symlink()
    assert outside.read_text() == "secret"


def test_a_new_file_is_refused_where_a_folder_lies(folder: Path) -> None:
    with pytest.raises(UntrustedFileError, match="deep"):
        untrusted.create_file(folder, "deep")
