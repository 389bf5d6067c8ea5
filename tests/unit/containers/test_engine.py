"""Finding an engine, and what a private one may believe and may not."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from containers.engine import engine, private_engine
from containers.errors import EngineError
from containers.hardware import machine_locks

DEAD = "unix:///nonexistent/docker.sock"


def test_the_given_host_is_asked_and_no_other(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"/nonexistent/docker.sock does not answer \(no such socket\)"):
        engine.connect(DEAD, tmp_path)


def test_a_given_host_that_does_not_answer_starts_nothing(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="does not answer"):
        engine.ensure(DEAD, tmp_path, print)
    assert list(tmp_path.iterdir()) == []


def test_an_unreadable_host_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        engine.connect("no scheme at all", tmp_path)
    assert "\n" not in str(caught.value)


def test_without_any_engine_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "DEFAULT_SOCKET", tmp_path / "absent.sock")
    with pytest.raises(EngineError, match=r"start Docker, set DOCKER_HOST, or run `slipway doctor --fix`"):
        engine.connect(None, tmp_path)


def test_a_stale_socket_of_the_private_engine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "DEFAULT_SOCKET", tmp_path / "absent.sock")
    socket = private_engine.paths(tmp_path).socket
    socket.parent.mkdir()
    socket.touch()
    with pytest.raises(EngineError, match=rf"{socket} does not answer .*slipway doctor --fix"):
        engine.connect(None, tmp_path)


def test_a_home_too_long_for_sockets_is_refused_by_bytes() -> None:
    root = "/" + "h" * (private_engine.SOCKET_PATH_BYTES - len(f"//docker/{private_engine.LONGEST_SOCKET}"))
    private_engine.check_socket_length(Path(root))
    with pytest.raises(EngineError, match=r"1 bytes too long .* set SLIPWAY_HOME to a shorter path"):
        private_engine.check_socket_length(Path(root + "h"))


def test_bridges_of_two_homes_differ_and_fit_a_device_name(tmp_path: Path) -> None:
    one, other = (private_engine.paths(tmp_path / name).bridge for name in ("one", "other"))
    assert one != other
    assert len(one) == len(other) == 15


def test_a_free_subnet_avoids_what_is_taken() -> None:
    first = private_engine.free_subnet("slipway01234567", [])
    second = private_engine.free_subnet("slipway01234567", [first])
    assert not second.overlaps(first)
    assert second.subnet_of(private_engine.SUBNETS)


def test_no_free_subnet_is_an_error() -> None:
    with pytest.raises(EngineError, match="is taken"):
        private_engine.free_subnet("slipway01234567", [ipaddress.IPv4Network("10.0.0.0/8")])


def test_a_process_id_is_believed_only_of_the_process_that_it_was_written_for(tmp_path: Path) -> None:
    place = private_engine.paths(tmp_path)
    place.root.mkdir()
    place.pid.write_text(str(os.getpid()))  # alive, and somebody else: as after a crash of the machine
    assert not private_engine.is_running(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()", f"--pidfile={place.pid}"], stdin=subprocess.PIPE) as ours:
        place.pid.write_text(str(ours.pid))
        while not any(private_engine._arguments(ours.pid)):  # it is being executed
            time.sleep(0.01)
        assert private_engine.is_running(tmp_path)
        ours.communicate(b"\n")
    assert not private_engine.is_running(tmp_path)


@pytest.mark.parametrize("content", ["", "not a number", "999999999"])
def test_a_damaged_pid_file_names_nobody(tmp_path: Path, content: str) -> None:
    place = private_engine.paths(tmp_path)
    place.root.mkdir()
    place.pid.write_text(content)
    assert not private_engine.is_running(tmp_path)


def test_stopping_what_never_ran_is_quiet(tmp_path: Path) -> None:
    said: list[str] = []
    assert not engine.stop(tmp_path, said.append)
    assert said == []


def test_the_daemon_inherits_proxies_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    environment = private_engine._environment()
    assert environment["HTTPS_PROXY"] == "http://proxy:3128"
    assert "secret" not in environment.values()


def test_mount_points_come_innermost_first(tmp_path: Path) -> None:
    assert private_engine._mounts_under(tmp_path) == []
    points = private_engine._mounts_under(Path("/dev"))
    assert points.index("/dev/pts") >= 0
    for number, point in enumerate(points):
        assert not any(later.startswith(f"{point}/") for later in points[number + 1 :])


def test_two_processes_that_install_packages_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(engine.shutil, "which", lambda _: "/usr/bin/apt-get")
    monkeypatch.setattr(machine_locks, "default_folder", lambda: tmp_path)
    monkeypatch.setattr(engine, "_services_not_started", contextlib.nullcontext)
    ran, waits = threading.Event(), threading.Event()

    def install(_: object) -> subprocess.CompletedProcess[str]:
        ran.set()
        return subprocess.CompletedProcess([], 0, "")

    monkeypatch.setattr(engine, "_apt", install)

    def progress(line: str) -> None:
        if "waiting" in line:
            waits.set()

    thread = threading.Thread(target=engine.install_packages, args=(["redis"], progress))
    with machine_locks.locked(tmp_path, machine_locks.PACKAGES):
        thread.start()
        assert waits.wait(10)
        assert not ran.is_set()
    thread.join(10)
    assert ran.is_set()
