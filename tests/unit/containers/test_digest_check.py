"""When a file's digest need not be computed again, and which changes of the file are noticed then."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from slipway_loader import digest_check
from slipway_loader.digest_check import DigestCheck

CONTENT = os.urandom(3 * mmap.PAGESIZE)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
TICK = 0.05
EXT4_IOC_MOVE_EXT = 0xC028660F


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(digest_check, "_TICK_NS", TICK * 1e9)
    if digest_check._file_system(tmp_path.stat().st_dev) not in digest_check._VOUCHING:
        pytest.skip(f"marks need ext4 or xfs, and {tmp_path} is on neither")
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    time.sleep(2 * TICK)
    return path


def check(path: Path, marks: Path | None, meanwhile: Callable[[], object] = lambda: None) -> tuple[str | None, int]:
    """Read a file through a check; return what is wrong with it, and how many bytes were hashed."""
    hashed = 0
    with path.open("rb", buffering=0) as file:
        checking = DigestCheck(file.fileno(), SHA256, marks)
        total = checking._total

        class Counting:
            def update(self, part: bytes) -> None:
                nonlocal hashed
                hashed += len(part)
                total.update(part)

            hexdigest = total.hexdigest

        checking._total = Counting()
        while part := file.read(1000):
            checking.update(part)
        meanwhile()
        return checking.problem(), hashed


def test_a_file_is_hashed_once_and_always_where_nothing_can_be_marked(weights: Path, marks: Path) -> None:
    assert check(weights, None) == check(weights, marks) == (None, len(CONTENT))
    assert [path.name for path in marks.iterdir()] == [SHA256]
    assert check(weights, marks) == (None, 0)
    assert check(weights, None) == check(weights, marks.parent / "missing") == (None, len(CONTENT))


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"?")


def overwrite_with_old_times(path: Path) -> None:
    before = path.stat()
    overwrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    other = path.with_suffix(".other")
    other.write_bytes(b"?" + CONTENT[1:])
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [overwrite, overwrite_with_old_times, replace])
def test_a_marked_file_that_changed_is_hashed_and_refused(
    weights: Path, marks: Path, change: Callable[[Path], None]
) -> None:
    check(weights, marks)
    change(weights)
    assert check(weights, marks)[0] == "changed: another sha256 than in the manifest"
    assert check(weights, marks)[0] is not None


def test_a_page_that_was_mapped_and_written_before_can_not_be_changed_unnoticed(weights: Path, marks: Path) -> None:
    with weights.open("r+b") as file, mmap.mmap(file.fileno(), 0) as page:
        page[0] = CONTENT[0]  # from here on the page is writable without the kernel
        time.sleep(2 * TICK)
        assert check(weights, marks) == (None, len(CONTENT))
        assert check(weights, marks) == (None, 0)
        page[0] = CONTENT[0] ^ 1
        assert check(weights, marks)[0] == "changed: another sha256 than in the manifest"


def test_an_exchange_of_blocks_is_not_noticed(weights: Path, marks: Path) -> None:
    """The limit of a mark, as the documentation states it: it is not for weights that somebody else may write to."""
    check(weights, marks)
    other = weights.with_name("other")
    other.write_bytes(b"?" * len(CONTENT))
    with other.open("r+b") as source, weights.open("r+b") as target:
        for file in (source, target):
            os.fsync(file)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        pages = len(CONTENT) // os.fstat(target.fileno()).st_blksize
        try:
            fcntl.ioctl(source, EXT4_IOC_MOVE_EXT, struct.pack("=IIQQQQ", 0, target.fileno(), 0, 0, pages, 0))
        except OSError as error:
            pytest.skip(f"the file system exchanges no blocks: {error}")
    assert weights.read_bytes() != CONTENT
    assert check(weights, marks) == (None, 0)
    assert check(weights, None)[0] == "changed: another sha256 than in the manifest"


def test_a_change_during_a_start_is_refused_or_leaves_no_mark(weights: Path, marks: Path) -> None:
    def restore() -> None:
        weights.write_bytes(CONTENT)

    assert check(weights, marks, restore) == (None, len(CONTENT))
    assert not list(marks.iterdir())
    time.sleep(2 * TICK)
    check(weights, marks)
    assert check(weights, marks, restore) == ("changed while it was read", 0)


def test_a_file_that_changed_within_a_tick_gets_no_mark(
    weights: Path, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_check, "_TICK_NS", 1e15)
    assert check(weights, marks) == (None, len(CONTENT))
    assert not list(marks.iterdir())


def test_the_mark_of_another_file_or_boot_does_not_count(weights: Path, marks: Path) -> None:
    check(weights, marks)
    mark = marks / SHA256
    boot, rest = mark.read_text().split(" ", 1)
    mark.write_text(f"{boot[::-1]} {rest}")
    assert check(weights, marks) == (None, len(CONTENT))
    copy = weights.with_name("copy.safetensors")
    copy.write_bytes(CONTENT)
    time.sleep(2 * TICK)
    assert check(copy, marks) == (None, len(CONTENT))
