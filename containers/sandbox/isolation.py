"""A network that leads nowhere, for one container."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import docker
import requests
from docker.models.containers import Container
from docker.models.networks import Network

from containers.engine.private_engine import SYSTEM_PATH
from containers.errors import ContainerError

# How far a container can see, as evidence says it.
ISOLATED = "internal: reached by this machine alone, and reaches nothing"
UNSEALED = "internal: reached by this machine alone; that it reaches this machine's services was not prevented"
PUBLISHED = "published on 127.0.0.1; what it reaches was not limited"
# Docker answers names on an internal network from its own resolver, which asks the machine's: here nobody is asked.
NO_DNS = "127.0.0.1"

# Only what answers leaves: packets of TCP that do not ask for a connection. Without a way to make other packets (raw
# sockets are a capability) that is no more than answers, and it needs no tracking of connections. Nor does it hear an
# answer to what it may have asked before.
_RULES = """*filter
-F INPUT
-A INPUT -i lo -j ACCEPT
-A INPUT -p tcp --tcp-flags SYN,ACK SYN,ACK -j DROP
-A INPUT -p tcp -j ACCEPT
-A INPUT -j DROP
-F OUTPUT
-A OUTPUT -o lo -j ACCEPT
-A OUTPUT -p tcp ! --syn -j ACCEPT
-A OUTPUT -j REJECT
COMMIT
"""
_FAMILIES = ("iptables", "ip6tables")
# What the SDK has for a URL where it speaks through a Unix socket; over ssh it ends in `ssh`.
_UNIX_SOCKET = "http+docker://localhost"


class NetworkError(ContainerError):
    """The engine can't make or remove a network."""


@contextlib.contextmanager
def network(client: docker.DockerClient, name: str, labels: Mapping[str, str]) -> Iterator[str | None]:
    """Make the internal network ``name``, and remove it after the block; gives its name, or None where there is none.

    An internal network leads to no other machine, and its port is published nowhere: this machine reaches the container
    by its address, and `unplugged` keeps the container from this machine. Engines before 25 give it a default route,
    and keep packets in by the machine's firewall; one that may not touch that (Slipway's private engine) leaves it to
    the machine, which forwards nothing unless it is told to. So the route goes too. Where the engine's network is not
    this machine's (a remote engine, Docker Desktop, a rootless one) there is none, and the port is published on
    loopback instead.
    """
    if not is_local(client):
        yield None
        return
    try:
        made = client.networks.create(name, driver="bridge", internal=True, labels=dict(labels))
    except (docker.errors.APIError, requests.RequestException) as error:
        raise NetworkError(f"can't make a network for the sandbox: {error}") from error
    try:
        yield name
    finally:
        remove(made)


@contextlib.contextmanager
def unplugged(container: Container) -> Iterator[Callable[[], bool]]:
    """Start a container in the block with its network unplugged; what is given seals it, and says whether that held.

    On an internal network this machine is the one neighbour, and its services that listen on every address answer
    there. So the container's own network namespace gets rules by which it answers and asks nobody; its capabilities do
    not suffice to change them. Until they stand, the bridge is down, so that nothing it does at once gets through.
    """
    bridges = _bridges(container)
    down = bool(bridges) and all(_ip("link", "set", each, "down") for each in bridges)
    try:
        yield lambda: _sealed(container) and down
    finally:
        for each in bridges:
            _ip("link", "set", each, "up")


def _sealed(container: Container) -> bool:
    """Close a running container's network namespace; False where this process can't, or can't tell whose it is."""
    container.reload()
    pid = container.attrs["State"]["Pid"]
    if container.attrs["HostConfig"]["PortBindings"] or not pid or not _is_of(container, pid):
        return False
    if _has_default_route(pid):
        _within(pid, ["ip", "route", "delete", "default"], "")
    ruled = all(_within(pid, [f"{family}-restore", "--wait", "10", "--noflush"], _RULES) for family in _FAMILIES)
    # What waits for its neighbour's address has passed where the rules are now: with the device it is dropped.
    devices = [(device, state) for device in _devices(pid) for state in ("down", "up")]
    return ruled and all(_within(pid, ["ip", "link", "set", device, state], "") for device, state in devices)


def _bridges(container: Container) -> list[str]:
    """The devices of this machine that are a container's internal networks; none where they can't be told."""
    found = []
    for name in container.attrs["NetworkSettings"]["Networks"]:
        try:
            attributes = container.client.networks.get(name).attrs if container.client else {}
        except (docker.errors.APIError, requests.RequestException):
            return []
        options = attributes.get("Options") or {}
        device = options.get("com.docker.network.bridge.name") or f"br-{attributes.get('Id', '')[:12]}"
        if attributes.get("Internal") and Path(f"/sys/class/net/{device}/bridge").is_dir():
            found.append(device)
    return found


def _is_of(container: Container, pid: int) -> bool:
    """Whether a process of this machine is of the container: an engine elsewhere counts its processes otherwise."""
    try:
        return str(container.id) in Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return False


def _within(pid: int, command: Sequence[str], text: str) -> bool:
    return _ran(["nsenter", f"--net=/proc/{pid}/ns/net", *command], text)


def _ip(*words: str) -> bool:
    return _ran(["ip", *words], "")


def _ran(command: Sequence[str], text: str) -> bool:
    try:
        done = subprocess.run(
            command, env={"PATH": SYSTEM_PATH}, input=text, text=True, capture_output=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _devices(pid: int) -> list[str]:
    """The devices of a process's network, but for loopback."""
    try:
        lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    except OSError:
        return []
    return [name for line in lines if (name := line.partition(":")[0].strip()) != "lo"]


def _has_default_route(pid: int) -> bool:
    try:
        lines = Path(f"/proc/{pid}/net/route").read_text().splitlines()[1:]
    except OSError:
        return False
    return any(line.split()[1] == "00000000" for line in lines)


def is_local(client: docker.DockerClient) -> bool:
    """Whether containers' addresses can be reached from this machine."""
    if client.api.base_url != _UNIX_SOCKET:
        return False
    about = client.info()
    rootless = any("rootless" in option for option in about.get("SecurityOptions") or ())
    return not rootless and "Docker Desktop" not in str(about.get("OperatingSystem"))


def remove(network: Network) -> None:
    """Remove a network; that it is gone already is as good."""
    try:
        network.remove()
    except docker.errors.NotFound:
        return
    except docker.errors.APIError as error:
        raise NetworkError(f"can't remove the network {network.name}: {error}") from error
