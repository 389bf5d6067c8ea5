"""Homes of one machine exclude each other, whoever made the lock file, and nobody is led elsewhere by a planted one."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from checkout import CHECKOUT
from containers.hardware import machine_locks
from containers.hardware.machine_locks import MachineLockError, default_folder, locked, try_lock
from pipeline.settings import Settings
from pipeline.spec import load
from pipeline.stages.context import StageContext
from registry.errors import FileSystemError

if TYPE_CHECKING:
    from collections.abc import Callable

HOLD = """
import sys
from pathlib import Path
from containers.hardware.machine_locks import locked
with locked(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Callable[[str], subprocess.Popen[str]]:
    """Start a process that holds a lock until its stdin ends, or it is killed."""

    def start(name: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path), name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    return start


def context(home: Path, locks: Path, tell: Callable[[str], None] = print) -> StageContext:
    settings = Settings.read({"SLIPWAY_HOME": str(home), "SLIPWAY_LOCKS": str(locks)})
    return StageContext(load(CHECKOUT / "models" / "demo.yaml"), "awq", settings, tell)


def test_two_homes_of_one_machine_never_have_the_device_at_once(tmp_path: Path) -> None:
    told: list[str] = []
    order: list[str] = []
    waiting = threading.Event()

    def tell(line: str) -> None:
        told.append(line)
        waiting.set()

    second = context(tmp_path / "b", tmp_path, tell)

    def other() -> None:
        with second.device():
            order.append("second")

    thread = threading.Thread(target=other)
    with context(tmp_path / "a", tmp_path).device():
        thread.start()
        assert waiting.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert told == ["waiting for the device, which another release of this machine uses"]


def test_a_timed_model_waits_for_heavy_work_of_another_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stages.context.gpus", list)
    one, two = context(tmp_path / "a", tmp_path), context(tmp_path / "b", tmp_path)
    with one.cores(), two.cores():
        assert try_lock(tmp_path, machine_locks.CORES) is None
    with one.cores(alone=True):
        assert try_lock(tmp_path, machine_locks.CORES, shared=True) is None


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, holder: Callable[[str], subprocess.Popen[str]]) -> None:
    with holder("a.lock") as process:
        assert try_lock(tmp_path, "a.lock") is None
        process.kill()
        process.wait()
    free = try_lock(tmp_path, "a.lock")
    assert free is not None
    os.close(free)


def test_a_lock_file_is_readable_by_all_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with locked(tmp_path, "a.lock"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.lock").stat().st_mode) == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]


def test_a_lock_file_that_only_its_owner_may_write_is_locked_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.lock").touch()
    (tmp_path / "a.lock").chmod(0o444)
    with locked(tmp_path, "a.lock"):
        assert try_lock(tmp_path, "a.lock") is None


@pytest.mark.parametrize(
    ("plant", "why"),
    [
        (lambda path, victim: path.symlink_to(victim), "it is a link"),
        (lambda path, _: os.mkfifo(path), "it is not a regular file"),
        (lambda path, _: path.mkdir(), "it is not a regular file"),
    ],
    ids=["link", "fifo", "folder"],
)
def test_a_planted_file_is_refused_and_not_followed(
    tmp_path: Path, plant: Callable[[Path, Path], None], why: str
) -> None:
    victim = tmp_path / "victim"
    plant(tmp_path / "a.lock", victim)
    with pytest.raises(MachineLockError, match=rf"can't lock .*a\.lock: {why}; remove it, or set SLIPWAY_LOCKS"):
        try_lock(tmp_path, "a.lock")
    assert not victim.exists()


def wait_until_waited_for(path: Path) -> None:
    """Wait until the kernel lists somebody who waits for the lock on the file: `1: -> FLOCK ... 08:01:INODE 0 EOF`."""
    waiter = re.compile(rf"-> FLOCK .*:{path.stat().st_ino} 0 EOF")
    deadline = time.monotonic() + 60
    while not waiter.search(Path("/proc/locks").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_on_the_new_one(tmp_path: Path) -> None:
    """A cleaner of temporary folders must not let two processes hold "the" lock, each on a file of its own."""
    got = threading.Event()
    waits = threading.Event()

    def wait() -> None:
        with locked(tmp_path, "a.lock", waits.set):
            got.set()

    first = try_lock(tmp_path, "a.lock")
    assert first is not None
    thread = threading.Thread(target=wait)
    thread.start()
    assert waits.wait(10)
    wait_until_waited_for(tmp_path / "a.lock")
    (tmp_path / "a.lock").unlink()
    with locked(tmp_path, "a.lock"):
        os.close(first)
        assert not got.wait(0.2)
    thread.join(10)
    assert got.is_set()


def test_a_folder_that_can_not_be_written_to_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MachineLockError, match=r"absent/a\.lock: No such file or directory; .*set SLIPWAY_LOCKS"):
        try_lock(tmp_path / "absent", "a.lock")


def test_a_folder_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(FileSystemError, match=rf"the file system of {tmp_path}/a\.lock has no locks"):
        try_lock(tmp_path, "a.lock")


def test_every_user_comes_to_the_same_folder(tmp_path: Path) -> None:
    ours, everybodys = tmp_path / "root", tmp_path / "all"
    for folder, mode in ((ours, 0o755), (everybodys, 0o1777)):
        folder.mkdir()
        folder.chmod(mode)
    assert default_folder((tmp_path / "absent", ours, everybodys)) == everybodys


def test_the_folder_is_a_setting(tmp_path: Path) -> None:
    assert Settings.read({"SLIPWAY_LOCKS": str(tmp_path)}).locks == tmp_path
    assert Settings.read({}).locks == default_folder()
