"""A private ``dockerd``, whose files are all under ``$SLIPWAY_HOME/docker``; outside of it there is one bridge device.

It changes neither the host's firewall nor its IP forwarding: containers reach each other and the host, and ports are
published by docker's userland proxy.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import requests

from containers.errors import EngineError
from registry.file_locks import locked
from registry.progress import Progress

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# sun_path of a Unix socket has 108 bytes with its final zero (unix(7)); containerd's socket has the longest path.
SOCKET_PATH_BYTES = 107
LONGEST_SOCKET = "run/containerd/containerd.sock.ttrpc"
START_SECONDS = 60.0
STOP_SECONDS = 45.0
# Subnets for bridges are chosen from these 256 of /24, a part of 10/8 that few networks use.
SUBNETS = ipaddress.IPv4Network("10.213.0.0/16")
# The only variables that dockerd inherits: proxies for pulls.
INHERITED = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")


@dataclass(frozen=True)
class EnginePaths:
    """The paths of a home's private engine."""

    root: Path

    @property
    def socket(self) -> Path:
        """The socket of its API."""
        return self.root / "docker.sock"

    @property
    def pid(self) -> Path:
        """The daemon's process id."""
        return self.root / "dockerd.pid"

    @property
    def log(self) -> Path:
        """The daemon's log of its latest start."""
        return self.root / "dockerd.log"

    @property
    def data(self) -> Path:
        """Images, layers and containers."""
        return self.root / "data"

    @property
    def run(self) -> Path:
        """State of running containers; not needed once the daemon has stopped."""
        return self.root / "run"

    @property
    def containerd_pid(self) -> Path:
        """The process id of the containerd that dockerd starts."""
        return self.run / "containerd" / "containerd.pid"

    @property
    def bridge(self) -> str:
        """The name of its network device: at most 15 characters, different for each home."""
        return "slipway" + hashlib.sha256(os.fsencode(self.root)).hexdigest()[:8]


def paths(home: Path) -> EnginePaths:
    """Return the paths of the private engine of ``home``; symbolic links are resolved."""
    return EnginePaths(home.resolve() / "docker")


def check_socket_length(home: Path) -> None:
    """Raise EngineError if the paths of the engine's sockets under ``home`` are longer than Unix allows."""
    root = paths(home).root
    too_long = len(os.fsencode(root / LONGEST_SOCKET)) - SOCKET_PATH_BYTES
    if too_long > 0:
        raise EngineError(
            f"SLIPWAY_HOME={home.resolve()} is {too_long} bytes too long for the container engine's sockets "
            f"(Unix allows {SOCKET_PATH_BYTES}): set SLIPWAY_HOME to a shorter path"
        )


def knock(path: Path) -> None:
    """Raise OSError unless a process listens on the Unix socket ``path``.

    The SDK checks this too, but leaks its socket when the connection is refused (docker 7.1).
    """
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5)
        probe.connect(os.fspath(path))


def is_running(home: Path) -> bool:
    """Return whether the private engine of ``home`` is alive."""
    return _daemon_pid(paths(home)) is not None


def start(home: Path, progress: Progress) -> None:
    """Start the private engine and wait until it answers. The caller holds the lock.

    Raises:
        EngineError: it did not start; the message has the last line of its log.
    """
    place = paths(home)
    check_socket_length(home)
    began = time.monotonic()
    _remove_remains(place)
    try:
        for folder in (place.data, place.run):
            folder.mkdir(parents=True, exist_ok=True, mode=0o711)
    except OSError as error:
        raise EngineError(f"can't create the folders of the private container engine: {error}") from error
    _make_bridge(place.bridge)
    progress("starting a private container engine")
    (place.root / "daemon.json").write_text("{}\n")  # so that /etc/docker/daemon.json is not used
    with place.log.open("wb") as log:
        process = subprocess.Popen(
            _command(place), env=_environment(), cwd=place.root, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    while not _answers(place.socket):
        if process.poll() is not None or time.monotonic() - began > START_SECONDS:
            _end(process.pid, STOP_SECONDS)
            process.wait()
            _clean_up(place)
            raise EngineError(
                f"the private container engine did not start: {_last_words(place.log)} (log: {place.log})"
            )
        time.sleep(0.1)
    # The daemon outlives this process; a return code prevents Popen's warning that it still runs.
    process.returncode = 0
    progress(f"the private container engine answers after {time.monotonic() - began:.1f} s")


def stop(home: Path, progress: Progress) -> bool:
    """Stop the private engine and remove its processes, mounts and bridge; return whether it ran."""
    place = paths(home)
    pid = _daemon_pid(place)
    if pid is not None:
        progress(f"stopping the private container engine (process {pid})")
        _end(pid, STOP_SECONDS)
    _clean_up(place)
    return pid is not None


def _command(place: EnginePaths) -> list[str]:
    return [
        "dockerd",
        f"--config-file={place.root / 'daemon.json'}",
        f"--host=unix://{place.socket}",
        "--group=root",
        f"--data-root={place.data}",
        f"--exec-root={place.run}",
        f"--pidfile={place.pid}",
        f"--bridge={place.bridge}",
        "--iptables=false",
        "--ip6tables=false",
        "--ip-forward=false",
        "--ip-masq=false",
        "--userland-proxy=true",
        "--log-driver=json-file",
        "--log-opt=max-size=64m",
        "--log-level=warn",
    ]


def _environment() -> dict[str, str]:
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return {**inherited, "PATH": SYSTEM_PATH, "HOME": "/root", "LC_ALL": "C.UTF-8"}


def _answers(path: Path) -> bool:
    client = None
    try:
        knock(path)
        client = docker.DockerClient(base_url=f"unix://{path}", timeout=5)
        return bool(client.ping())
    except (docker.errors.DockerException, requests.RequestException, OSError):
        return False
    finally:
        if client is not None:
            client.close()


def _daemon_pid(place: EnginePaths) -> int | None:
    """Return the daemon's process id if that process runs and is the daemon of this home."""
    return _pid_if(place.pid, f"--pidfile={place.pid}")


def _pid_if(file: Path, argument: str) -> int | None:
    """Read a process id from a file; None unless that process was started with ``argument``."""
    try:
        pid = int(file.read_text().strip())
    except (OSError, ValueError):
        return None
    return pid if argument in _arguments(pid) else None


def _arguments(pid: int) -> list[str]:
    """Return the command line of a running process; empty if there is none."""
    try:
        return [os.fsdecode(part) for part in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
    except OSError:
        return []


def _remove_remains(place: EnginePaths) -> None:
    """Remove the remains of an engine that was killed (a crash of the machine, kill -9).

    A process id in its files may belong to another process by now: dockerd refuses to start if its own does, and kills
    the process whose id is in containerd's file.
    """
    if (pid := _daemon_pid(place)) is not None:  # alive, but it does not answer
        _end(pid, STOP_SECONDS)
    _clean_up(place)


def _clean_up(place: EnginePaths) -> None:
    """End the orphaned processes of a stopped daemon and remove its mounts, bridge, socket and pid files."""
    for pid in _orphans(place):
        _end(pid, 5.0)
    for mount in _mounts_under(place.root):
        done = subprocess.run(["umount", mount], capture_output=True, check=False)
        if done.returncode != 0:
            subprocess.run(["umount", "--lazy", mount], capture_output=True, check=False)
    if Path(f"/sys/class/net/{place.bridge}").exists():
        subprocess.run(_ip("link", "delete", place.bridge), capture_output=True, check=False)
    for file in (place.pid, place.containerd_pid, place.socket):
        file.unlink(missing_ok=True)


def _orphans(place: EnginePaths) -> list[int]:
    """Return the containerd and shims of this home's engine, found by its run folder in their command lines.

    Containerd comes first, so that it starts no new processes. A container's main process is a child of its shim and
    is listed before it.
    """
    run = os.fspath(place.run)
    containerd: list[int] = []
    shims: list[int] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        arguments = _arguments(int(entry.name))
        if not any(part.startswith(f"{run}/containerd/") for part in arguments):
            continue
        name = Path(arguments[0]).name
        if name == "containerd":
            containerd.append(int(entry.name))
        elif name.startswith("containerd-shim"):
            shims.append(int(entry.name))
    return [*containerd, *(child for shim in shims for child in _children(shim)), *shims]


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def _end(pid: int, seconds: float) -> None:
    """End a process with SIGTERM, and with SIGKILL after ``seconds``; it may not be a child, so /proc is polled."""
    for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 10.0)):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if _is_gone(pid):
                return
            time.sleep(0.05)


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in {"Z", "X"}
    except OSError:
        return True


def _mounts_under(root: Path) -> list[str]:
    """Return the mount points below ``root``, the innermost first."""
    points = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), line.split()[4])
        if point.startswith(f"{root}/"):
            points.append(point)
    return points[::-1]


def _ip(*words: str) -> list[str]:
    return ["ip", *words]


def _run_ip(*words: str) -> str:
    done = subprocess.run(
        _ip(*words), capture_output=True, text=True, check=False, env={"PATH": SYSTEM_PATH, "LC_ALL": "C"}
    )
    if done.returncode != 0:
        raise EngineError(f"`ip {' '.join(words)}` failed: {done.stderr.strip()}; is this root with CAP_NET_ADMIN?")
    return done.stdout


def _make_bridge(name: str) -> None:
    """Create the engine's bridge with a free subnet; a lock serializes the choice with engines of other homes."""
    Path("/run/lock").mkdir(parents=True, exist_ok=True)
    with locked(Path("/run/lock/slipway-network.lock")):
        subnet = free_subnet(name, _networks())
        _run_ip("link", "add", name, "type", "bridge")
        _run_ip("address", "add", f"{subnet.network_address + 1}/{subnet.prefixlen}", "dev", name)
        _run_ip("link", "set", name, "up")


def free_subnet(name: str, taken: Sequence[ipaddress.IPv4Network]) -> ipaddress.IPv4Network:
    """Return the first /24 that overlaps none of ``taken``, starting from one derived from ``name``."""
    candidates = list(SUBNETS.subnets(new_prefix=24))
    first = int(hashlib.sha256(name.encode()).hexdigest(), 16) % len(candidates)
    for candidate in candidates[first:] + candidates[:first]:
        if not any(candidate.overlaps(network) for network in taken):
            return candidate
    raise EngineError(f"every network in {SUBNETS} is taken: start Docker yourself or set DOCKER_HOST")


def _networks() -> list[ipaddress.IPv4Network]:
    """Return the IPv4 networks of this machine's addresses and routes, without the default route."""
    texts: list[str] = []
    for interface in _json(_run_ip("-json", "-4", "address", "show")):
        texts += [f"{address['local']}/{address['prefixlen']}" for address in interface.get("addr_info", [])]
    texts += [route["dst"] for route in _json(_run_ip("-json", "-4", "route", "show", "table", "all"))]
    networks = []
    for text in texts:
        try:
            networks.append(ipaddress.IPv4Network(text, strict=False))
        except ValueError:  # "default"
            continue
    return [network for network in networks if network.prefixlen > 0]


def _json(text: str) -> list[dict[str, Any]]:
    value: list[dict[str, Any]] = json.loads(text or "[]")
    return value


def _last_words(log: Path) -> str:
    """Return the last line of the daemon's log that is not empty."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return lines[-1][-300:] if lines else "its log is empty"
