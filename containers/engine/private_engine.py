"""A private ``dockerd``: everything it makes lies under ``$SLIPWAY_HOME/docker``, but for one bridge device.

It touches neither the host's firewall nor its forwarding: containers reach each other and the host, ports are published
by docker's userland proxy, and nothing is routed further.
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
# sun_path of a Unix socket holds 108 bytes with its final zero (unix(7)); containerd's is the longest of them.
SOCKET_PATH_BYTES = 107
LONGEST_SOCKET = "run/containerd/containerd.sock.ttrpc"
START_SECONDS = 60.0
STOP_SECONDS = 45.0
# Where subnets for bridges are looked for: 256 of /24 in a corner of 10/8 that few networks use.
SUBNETS = ipaddress.IPv4Network("10.213.0.0/16")
# What dockerd may inherit: the way to a proxy for pulls. Nothing else of the caller's environment reaches it.
INHERITED = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")


@dataclass(frozen=True)
class EnginePaths:
    """Where the private engine of one home keeps what it makes."""

    root: Path

    @property
    def socket(self) -> Path:
        """Its API."""
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
        """State of what is running; useless once it is not."""
        return self.root / "run"

    @property
    def containerd_pid(self) -> Path:
        """The process id of the containerd that dockerd starts."""
        return self.run / "containerd" / "containerd.pid"

    @property
    def bridge(self) -> str:
        """The network device's name: at most 15 characters, one a home."""
        return "slipway" + hashlib.sha256(os.fsencode(self.root)).hexdigest()[:8]


def paths(home: Path) -> EnginePaths:
    """Return where the private engine of ``home`` keeps what it makes; symbolic links are resolved."""
    return EnginePaths(home.resolve() / "docker")


def check_socket_length(home: Path) -> None:
    """Raise EngineError when the engine's sockets under ``home`` would have longer paths than Unix allows."""
    root = paths(home).root
    too_long = len(os.fsencode(root / LONGEST_SOCKET)) - SOCKET_PATH_BYTES
    if too_long > 0:
        raise EngineError(
            f"SLIPWAY_HOME={home.resolve()} is {too_long} bytes too long for the container engine's sockets "
            f"(Unix allows {SOCKET_PATH_BYTES}): set SLIPWAY_HOME to a shorter path"
        )


def knock(path: Path) -> None:
    """Raise OSError unless somebody listens on the Unix socket ``path``.

    The SDK would say so too, but leaves its own socket open when it is refused (docker 7.1).
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
        EngineError: it did not come up; the message holds the last line of its log.
    """
    place = paths(home)
    check_socket_length(home)
    began = time.monotonic()
    _forget_the_dead(place)
    try:
        for folder in (place.data, place.run):
            folder.mkdir(parents=True, exist_ok=True, mode=0o711)
    except OSError as error:
        raise EngineError(f"the private container engine has no place to work: {error}") from error
    _make_bridge(place.bridge)
    progress("starting a private container engine")
    (place.root / "daemon.json").write_text("{}\n")  # so that /etc/docker/daemon.json has no say
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
    # It outlives this process; nobody is to warn that it was not waited for.
    process.returncode = 0
    progress(f"the private container engine answers after {time.monotonic() - began:.1f} s")


def stop(home: Path, progress: Progress) -> bool:
    """End the private engine and what it left: processes, mounts, bridge. Return whether it ran."""
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
    """The daemon's process id, if that process is alive and is the daemon of this very home."""
    return _pid_if(place.pid, f"--pidfile={place.pid}")


def _pid_if(file: Path, argument: str) -> int | None:
    """Read a process id, and trust it only where that process was started with ``argument``."""
    try:
        pid = int(file.read_text().strip())
    except (OSError, ValueError):
        return None
    return pid if argument in _arguments(pid) else None


def _arguments(pid: int) -> list[str]:
    """The command line of a living process; empty when there is none."""
    try:
        return [os.fsdecode(part) for part in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
    except OSError:
        return []


def _forget_the_dead(place: EnginePaths) -> None:
    """Remove what an engine left that died without a word (a crash of the machine, kill -9).

    A process id in such a file may belong to anyone by now. dockerd would refuse to start for its own, and would
    take containerd's for a containerd that hangs, and kill it.
    """
    if (pid := _daemon_pid(place)) is not None:  # alive, but it does not answer
        _end(pid, STOP_SECONDS)
    _clean_up(place)


def _clean_up(place: EnginePaths) -> None:
    """End orphans of a dead daemon and remove its mounts, bridge, socket and pid files."""
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
    """The containerd and shims of this home's engine: their command lines name its run folder.

    Containerd comes first, so that it starts nothing anew. A shim's container ends with the shim: its main process is a
    child of the shim, and is listed before it.
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
    """Ask a process to end, and make it after ``seconds``; it may be no child of ours, so it is watched in /proc."""
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
    """Mount points below ``root``, the innermost first."""
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
    """Make the engine's bridge with a free subnet. Engines of other homes choose theirs one after the other."""
    Path("/run/lock").mkdir(parents=True, exist_ok=True)
    with locked(Path("/run/lock/slipway-network.lock")):
        subnet = free_subnet(name, _networks())
        _run_ip("link", "add", name, "type", "bridge")
        _run_ip("address", "add", f"{subnet.network_address + 1}/{subnet.prefixlen}", "dev", name)
        _run_ip("link", "set", name, "up")


def free_subnet(name: str, taken: Sequence[ipaddress.IPv4Network]) -> ipaddress.IPv4Network:
    """Return the first /24 that overlaps none in ``taken``, starting at a place that follows from ``name``."""
    candidates = list(SUBNETS.subnets(new_prefix=24))
    first = int(hashlib.sha256(name.encode()).hexdigest(), 16) % len(candidates)
    for candidate in candidates[first:] + candidates[:first]:
        if not any(candidate.overlaps(network) for network in taken):
            return candidate
    raise EngineError(f"every network in {SUBNETS} is taken: start Docker yourself or set DOCKER_HOST")


def _networks() -> list[ipaddress.IPv4Network]:
    """The IPv4 networks that this machine has addresses in or routes to, but for the default route."""
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
    """The last line of the daemon's log that says something."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return lines[-1][-300:] if lines else "it said nothing"
