"""A network that leads nowhere, for one container."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import docker
import requests
from docker.models.networks import Network

from containers.errors import ContainerError
from containers.private_engine import SYSTEM_PATH

# How far a container can see, as evidence says it.
ISOLATED, PUBLISHED = "internal: reached by this machine alone", "published on 127.0.0.1"
# Docker answers names on an internal network from its own resolver, which asks the machine's: here nobody is asked.
NO_DNS = "127.0.0.1"

# What the SDK has for a URL where it speaks through a Unix socket; over ssh it ends in `ssh`.
_UNIX_SOCKET = "http+docker://localhost"


class NetworkError(ContainerError):
    """The engine can't make or remove a network."""


@contextlib.contextmanager
def network(client: docker.DockerClient, name: str, labels: Mapping[str, str]) -> Iterator[str | None]:
    """Make the internal network ``name``, and remove it after the block; gives its name, or None where there is none.

    An internal network has no default route, so that nothing gets out, and its port is published nowhere: this machine
    reaches the container by its address. Where the engine's network is not this machine's (a remote engine, Docker
    Desktop, a rootless one) there is none, and the port is published on loopback instead.
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


def seal(pid: int) -> None:
    """Take the default route out of a container's network: a process's of it is ``pid`` on this machine.

    Engines before 25 give an internal network one, and keep packets in by the machine's firewall; one that may not
    touch the firewall (Slipway's private engine) leaves that to the machine, which forwards nothing unless it is told
    to. Without a route nothing depends on either. Where this process may not do it, the engine's own ways remain.
    """
    if not _has_default_route(pid):
        return
    command = ["nsenter", f"--net=/proc/{pid}/ns/net", "ip", "route", "delete", "default"]
    with contextlib.suppress(OSError):
        subprocess.run(command, env={"PATH": SYSTEM_PATH}, capture_output=True, check=False)


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
