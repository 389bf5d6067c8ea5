"""An isolated network for one container: this machine reaches the container, and the container reaches nothing."""

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
from containers.sandbox.container import until_gone

# The container's network access, as evidence states it.
ISOLATED = "internal: reachable only from this machine, reaches nothing"
UNSEALED = "internal: reachable only from this machine, can reach services of this machine"
PUBLISHED = "published on 127.0.0.1, outgoing connections not restricted"
# On an internal network Docker's resolver forwards names to the machine's; this address has no resolver.
NO_DNS = "127.0.0.1"

# Only TCP packets that do not open a connection leave the container. Without raw sockets (which need a capability)
# these can only be answers, so no connection tracking is needed. Answers to connections that it opened before are
# dropped.
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
# How long a busy engine may take to disconnect a container that it has been told to remove.
_DISCONNECTED_SECONDS = 30.0
_FAMILIES = ("iptables", "ip6tables")
# The Docker SDK's base URL for a Unix socket; over ssh it ends in `ssh`.
_UNIX_SOCKET = "http+docker://localhost"


class SandboxNetworkError(ContainerError):
    """The container engine can't create or remove a network."""


@contextlib.contextmanager
def network(client: docker.DockerClient, name: str, labels: Mapping[str, str]) -> Iterator[str | None]:
    """Create the internal network ``name`` and remove it after the block; yields its name, or None without a network.

    An internal network has no route to other machines and publishes no port: this machine reaches the container by its
    address, and `unplugged` keeps the container from reaching this machine. Docker before 25 adds a default route and
    relies on the machine's firewall. Slipway's private engine may not change the firewall, so `unplugged` also removes
    the route. If the engine's network is not this machine's (a remote engine, Docker Desktop, a rootless engine), no
    network is created, and the port is published on loopback instead.
    """
    if not is_local(client):
        yield None
        return
    try:
        made = client.networks.create(name, driver="bridge", internal=True, labels=dict(labels))
    except (docker.errors.APIError, requests.RequestException) as error:
        raise SandboxNetworkError(f"can't create a network for the sandbox: {error}") from error
    try:
        yield name
    finally:
        remove(made)


@contextlib.contextmanager
def unplugged(container: Container) -> Iterator[Callable[[], bool]]:
    """Keep a container's bridge down during the block; yields a function that seals the container's network.

    The function returns whether it succeeded. Services of this machine that listen on every address are reachable on
    an internal network. Sealing adds firewall rules in the container's network namespace, by which it can answer but
    not open connections; it lacks the capabilities to change them. Until the rules are in place the bridge is down.
    """
    bridges = _bridges(container)
    down = bool(bridges) and all(_ip("link", "set", each, "down") for each in bridges)
    try:
        yield lambda: _sealed(container) and down
    finally:
        for each in bridges:
            _ip("link", "set", each, "up")


def _sealed(container: Container) -> bool:
    """Add the rules in a running container's network namespace; False if this process can't, or can't identify it."""
    container.reload()
    pid = container.attrs["State"]["Pid"]
    if container.attrs["HostConfig"]["PortBindings"] or not pid or not _is_of(container, pid):
        return False
    if _has_default_route(pid):
        _within(pid, ["ip", "route", "delete", "default"], "")
    ruled = all(_within(pid, [f"{family}-restore", "--wait", "10", "--noflush"], _RULES) for family in _FAMILIES)
    # Packets queued for address resolution have passed the rules already; resetting the device drops them.
    devices = [(device, state) for device in _devices(pid) for state in ("down", "up")]
    return ruled and all(_within(pid, ["ip", "link", "set", device, state], "") for device, state in devices)


def _bridges(container: Container) -> list[str]:
    """Return this machine's bridge devices of a container's internal networks; none if the engine can't list them."""
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
    """Return whether this machine's process belongs to the container; a remote engine's process ids are others."""
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
    """Return the network devices of a process, without loopback."""
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
    """Return whether this machine can reach containers by their addresses."""
    if client.api.base_url != _UNIX_SOCKET:
        return False
    about = client.info()
    rootless = any("rootless" in option for option in about.get("SecurityOptions") or ())
    return not rootless and "Docker Desktop" not in str(about.get("OperatingSystem"))


def remove(network: Network) -> None:
    """Remove a network, once containers that are being removed have left it; one that is gone is no error."""
    try:
        until_gone(network.remove, lambda said: "has active endpoints" in said, _DISCONNECTED_SECONDS)
    except docker.errors.APIError as error:
        raise SandboxNetworkError(f"can't remove the network {network.name}: {error}") from error
