"""No worker process reads the environment that its parent was started with, whatever it tries; and it dies with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkout import CHECKOUT
from pipeline.workers.launchers.confinement import status_of

SECRET = "what the parent was started with"  # noqa: S105

PARENT = """
import subprocess, sys
from pipeline.workers.launchers import confinement
if sys.argv[1] == "no namespaces":
    works = confinement._works
    confinement._works = lambda prefix: "unshare" not in prefix and works(prefix)
done = subprocess.run(confinement.confined(sys.argv[2:]), env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
sys.exit(confinement.status_of(done.returncode) % 256)
"""

ATTACK = f"""
import glob, json, os, subprocess
for command in (["umount", "/proc"], ["umount", "--lazy", "/proc"], ["mount", "-t", "proc", "proc", "/proc"]):
    subprocess.run(command, capture_output=True)
parent = int(open("/proc/self/stat").read().rpartition(")")[2].split()[1])
found = []
for path in [*glob.glob("/proc/[0-9]*/environ"), f"/proc/{{parent}}/environ"]:
    try:
        if {SECRET!r}.encode() in open(path, "rb").read():
            found.append(path)
    except OSError:
        pass
print(json.dumps({{"found": found, "environment": list(os.environ.values())}}))
"""


def command(mode: str, *worker: str) -> list[str]:
    return [sys.executable, "-c", PARENT, mode, *worker]


def environment() -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT), "AWS_SECRET_ACCESS_KEY": SECRET}


@pytest.mark.parametrize("mode", ["namespaces", "no namespaces"])
def test_a_worker_finds_no_secret_of_its_parent(mode: str) -> None:
    done = subprocess.run(
        command(mode, sys.executable, "-c", ATTACK), env=environment(), capture_output=True, text=True, check=True
    )
    seen = json.loads(done.stdout)
    assert seen["found"] == []
    assert SECRET not in seen["environment"]


def test_a_worker_sees_no_process_but_its_own() -> None:
    probe = "import os; print(len([each for each in os.listdir('/proc') if each.isdigit()]))"
    done = subprocess.run(
        command("namespaces", sys.executable, "-c", probe),
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == 2  # the first of its namespace, and itself


def test_a_worker_dies_with_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "sleeps.py"
    script.write_text(f"import time; open({str(tmp_path / 'began')!r}, 'w').close(); time.sleep(600)")
    parent = subprocess.Popen(command("namespaces", sys.executable, str(script)), env=environment())
    _until((tmp_path / "began").exists)
    assert _processes_of(script)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _until(lambda: not _processes_of(script))


@pytest.mark.parametrize(("code", "status"), [(0, 0), (3, 3), (137, -9), (-9, -9)])
def test_a_status_says_which_signal_ended_a_worker(code: int, status: int) -> None:
    assert status_of(code) == status


def test_how_a_worker_ended_comes_through() -> None:
    for body, code in (("import sys; sys.exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9 % 256)):
        done = subprocess.run(command("namespaces", sys.executable, "-c", body), env=environment(), check=False)
        assert done.returncode == code


def _until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _processes_of(script: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.fsencode(script) in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue  # it has ended
    return found
