from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.file_locks import is_locked, locked, locked_if_free

HOLDER = """
import sys, time
from pathlib import Path
from registry.file_locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock `a.lock` until its standard input is closed."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "a.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_lock_is_seen_as_held_until_its_process_is_killed(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    assert is_locked(tmp_path / "a.lock")
    with locked_if_free(tmp_path / "a.lock") as is_free:
        assert not is_free
    holder.kill()
    holder.wait()
    assert not is_locked(tmp_path / "a.lock")
    with locked_if_free(tmp_path / "a.lock") as is_free:
        assert is_free


def test_a_process_that_has_to_wait_says_so_and_then_gets_the_lock(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    waited = []

    def waiting() -> None:
        waited.append(True)
        holder.kill()

    with locked(tmp_path / "a.lock", waiting):
        assert is_locked(tmp_path / "a.lock")
    assert waited == [True]


def test_no_file_means_no_lock(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / "a.lock")
    assert not (tmp_path / "a.lock").exists()
