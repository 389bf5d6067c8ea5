"""A private engine beside whatever runs already: it starts once, survives, publishes, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from containers.engine import engine as engines
from containers.engine import private_engine
from containers.errors import ContainerError, EngineError, ImageError
from containers.image import assembly, profile
from containers.image.base import ensure_base
from homes import FREE_PORT

STARTER = """
import sys
from pathlib import Path
from containers.engine import engine
engine.DEFAULT_SOCKET = Path("/nonexistent")
client = engine.ensure(None, Path(sys.argv[1]), print)
client.close()
"""


@pytest.fixture
def lair(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty home; its engine is ended whatever the test did."""
    if os.geteuid() != 0:
        pytest.xfail("a private engine needs root")
    monkeypatch.setattr(engines, "DEFAULT_SOCKET", Path("/nonexistent"))
    folder = tmp_path_factory.mktemp("e")
    yield folder
    engines.stop(folder, print)


def daemons(home: Path) -> list[int]:
    """Every living process that names the home's docker folder."""
    root = os.fsencode(private_engine.paths(home).root)
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if root in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def firewall() -> str:
    """The packet filter's rules and whether the machine forwards."""
    done = subprocess.run(["iptables-save"], capture_output=True, text=True, check=False)
    rules = [line for line in done.stdout.splitlines() if not line.startswith(("#", ":"))]
    return "\n".join([*rules, Path("/proc/sys/net/ipv4/ip_forward").read_text()])


def test_two_starts_at_once_make_one_engine_that_outlives_them(lair: Path) -> None:
    before = firewall()
    command = [sys.executable, "-c", STARTER, str(lair)]
    starters = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) for _ in range(2)]
    said = [starter.communicate(timeout=120)[0] for starter in starters]
    assert [starter.returncode for starter in starters] == [0, 0]
    assert sum("starting a private container engine" in text for text in said) == 1
    engines.connect(None, lair).close()
    assert firewall() == before


def test_it_publishes_on_loopback_and_routes_no_further(
    lair: Path, engine: docker.DockerClient, tmp_path: Path
) -> None:
    with contextlib.closing(engines.ensure(None, lair, print)) as private:
        command = ["python3", "-m", "http.server", "8000", "--directory", "/etc/apt"]
        container = private.containers.run(
            lent(private, engine, tmp_path), command, detach=True, read_only=True, cap_drop=["ALL"], user="65534",
            ports={"8000/tcp": FREE_PORT},
        )  # fmt: skip
        container.reload()
        (binding,) = container.ports["8000/tcp"] or []
        assert binding["HostIp"] == "127.0.0.1"
        assert answer(f"http://127.0.0.1:{binding['HostPort']}/") == 200
        routes = container.exec_run(["cat", "/proc/net/route"]).output.decode()  # type: ignore[union-attr]
        outside = container.exec_run(
            ["python3", "-c", "import socket; socket.create_connection(('1.1.1.1', 53), timeout=2)"]
        )
        assert outside.exit_code != 0, routes
        container.remove(force=True)


def answer(url: str) -> int:
    """The status of the first answer within ten seconds."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(50):
        try:
            with opener.open(url, timeout=2) as response:
                return int(response.status)
        except OSError:
            time.sleep(0.2)
    return 0


def test_stop_leaves_no_process_mount_device_or_socket(lair: Path) -> None:
    engines.ensure(None, lair, print).close()
    place = private_engine.paths(lair)
    assert daemons(lair)
    assert engines.stop(lair, print)
    assert daemons(lair) == []
    assert private_engine._mounts_under(place.root) == []
    assert not Path(f"/sys/class/net/{place.bridge}").exists()
    assert not place.socket.exists()
    assert not engines.stop(lair, print)


def test_after_a_crash_it_starts_again(lair: Path) -> None:
    engines.ensure(None, lair, print).close()
    place = private_engine.paths(lair)
    while pids := daemons(lair):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # containerd, which dies with dockerd
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    # The machine came up again, and these numbers belong to somebody else: this very process.
    place.pid.write_text(str(os.getpid()))
    place.containerd_pid.write_text(str(os.getpid()))
    engines.ensure(None, lair, print).close()
    assert private_engine.is_running(lair)


def test_a_daemon_that_cannot_start_tells_why(lair: Path) -> None:
    place = private_engine.paths(lair)
    place.root.mkdir()
    place.data.write_text("in the way of the data folder")
    with pytest.raises(EngineError) as caught:
        engines.ensure(None, lair, print)
    assert str(place.data) in str(caught.value)
    assert not Path(f"/sys/class/net/{place.bridge}").exists()


def lent(private: docker.DockerClient, engine: docker.DockerClient, home: Path) -> str:
    """Give the private engine the base that the shared one has."""
    base = ensure_base(engine, profile.load("vllm-cpu"), home, print)
    (image,) = private.images.load(b"".join(engine.images.get(base.reference).save()))
    return str(image.id)


def step(private: docker.DockerClient, base: str, home: Path, *command: str) -> None:
    with assembly.ran(private, base, command, what="the test", home=home, progress=print):
        pass


def test_an_engine_that_is_stopped_in_a_build_is_a_clear_error_and_the_next_build_works(
    lair: Path, engine: docker.DockerClient, tmp_path: Path
) -> None:
    with contextlib.closing(engines.ensure(None, lair, print)) as private:
        base = lent(private, engine, tmp_path)
        stopper = threading.Timer(3, engines.stop, (lair, print))
        stopper.start()
        with pytest.raises(ContainerError, match=r"^[^\n]*stopped answering[^\n]*$"):
            step(private, base, tmp_path, "sleep", "600")
        stopper.join()
    with contextlib.closing(engines.ensure(None, lair, print)) as private:
        for left in private.containers.list(all=True):  # its removal could not be asked for any more
            left.remove(force=True)
        step(private, base, tmp_path, "true")
        assert private.containers.list(all=True) == []


def test_a_full_disk_is_called_by_its_name(lair: Path, engine: docker.DockerClient, tmp_path: Path) -> None:
    root = private_engine.paths(lair).root
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600m", "tmpfs", str(root)], check=True)
    try:
        with contextlib.closing(engines.ensure(None, lair, print)) as private:
            base = lent(private, engine, tmp_path)
            with pytest.raises(ImageError, match="disk is full: free some space"):
                step(private, base, tmp_path, "dd", "if=/dev/zero", "of=/large", "bs=1M", "count=2000")
            assert private.containers.list(all=True) == []
    finally:
        engines.stop(lair, print)
        subprocess.run(["umount", str(root)], check=True)
