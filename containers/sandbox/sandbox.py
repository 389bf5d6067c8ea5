"""Serves an image in a hardened container on an isolated network, and removes both afterwards."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import httpx
import requests
from docker.models.containers import Container
from docker.types import DeviceRequest

from containers.engine.owner import (
    HOME_LABEL,
    HOST_LABEL,
    OWNER_LABEL,
    home_digest,
    is_alive,
    left_behind,
    marked,
    ownership,
)
from containers.errors import SandboxError, UnhealthyError
from containers.hardware import core_pool
from containers.hardware.core_pool import CoreRequest, Cores
from containers.hardware.cpu import Cpu, InstructionSet, this_cpu
from containers.hardware.gpu import disappeared
from containers.image import gpu_compatibility
from containers.sandbox import engine_report, failure, isolation, kernels, logs
from containers.sandbox.container import create, engine_errors, hardening, remove, terminated_by_exception
from containers.sandbox.engine_log import Failure
from containers.sandbox.engine_report import EngineReport
from containers.sandbox.kernels import ComputedOn, Kernels
from containers.sandbox.memory import MemorySampler, container_reader
from registry.progress import Progress

STAGE_LABEL = "slipway.stage"

PORT = "8000/tcp"
# vLLM finds its own address by the default route, which the sandbox lacks. An illegal instruction in one of its
# processes is visible only in the output of Python's fault handler.
_ENVIRONMENT = {"HOME": "/tmp", "VLLM_HOST_IP": "127.0.0.1", "PYTHONFAULTHANDLER": "1"}  # noqa: S108 - inside the container
_POLL_SECONDS = 0.25
_PROGRESS_SECONDS = 10.0


@dataclass
class Server:
    """A healthy server in the sandbox.

    ``started_seconds`` counts from the container's creation to its first healthy answer. ``died`` returns how it
    stopped and why, or None while it runs; ``failing`` returns what is wrong with a running one. ``network`` is its
    network access. ``url`` may change at a restart. ``gpus`` are its devices, by UUID or index, and ``ranks`` is the
    number of processes that its model is divided among; ``cores`` are the cores of this machine reserved for it, if
    any, and ``cpu`` is their CPU; ``kernels`` are reported by its engine, and ``report`` is what its log says that it
    applied. Its log is saved in the folder ``logs``.
    """

    url: str
    started_seconds: float
    memory_bytes: int
    cpus: float | None
    memory: MemorySampler
    died: Callable[[], Failure | None]
    container: Container | None = None
    gpus: tuple[str, ...] = ()
    ranks: int = 1
    network: str | None = None
    start_timeout_s: float = 300.0
    cores: Cores | None = None
    cpu: Cpu | None = None
    kernels: Kernels | None = None
    failing: Callable[[], Failure | None] = lambda: None
    logs: Path | None = None
    report: EngineReport | None = None

    def failed(self) -> Failure | None:
        """Return how it stopped, or what is wrong with it while it runs; None if it works.

        A GPU that disappeared is the reason, whatever the engine says of it.
        """
        lost = disappeared(self.gpus)
        return (None if lost is None else Failure(lost)) or self.died() or self.failing()

    @property
    def computed_on(self) -> ComputedOn:
        """What computes its answers; for the CPU, the engine's report takes precedence over this machine's."""
        cpu: dict[str, Any] = {}
        if self.cpu is not None:
            cpu = {"cpu_model": self.cpu.model, "instruction_set": self.cpu.instruction_set}
        if self.cores is not None:
            cpu |= {"cores": self.cores.numbers, "cores_shared": self.cores.shared}
        if self.kernels is not None:
            cpu |= self.kernels.model_dump(include={"cpu_model", "instruction_set"})
        return ComputedOn(gpus=self.gpus, kernels=self.kernels, **cpu)

    def restart(self) -> None:
        """Restart the container, whether or not it runs, and wait until it is healthy.

        Raises:
            SandboxError: there is no container, it does not start, or it is not healthy in time.
        """
        if self.container is None:
            raise SandboxError("this server does not run in a container and can't be restarted")
        with (
            engine_errors(f"can't restart the container {self.container.name}"),
            isolation.unplugged(self.container) as seal,
        ):
            self.container.restart(timeout=1)
            sealed = seal()
        if self.network == isolation.ISOLATED and not sealed:
            self.network = isolation.UNSEALED
        self.url = _wait(self.container, time.monotonic(), self.start_timeout_s, lambda _: None, self.logs)


@contextlib.contextmanager
def serve(
    client: docker.DockerClient,
    image: str,
    *,
    name: str,
    home: Path,
    memory_bytes: int,
    cpus: float | None = None,
    labels: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    command: Sequence[str] | None = None,
    mounts: Mapping[Path, str] | None = None,
    gpus: Sequence[str] = (),
    cores: CoreRequest | None = None,
    cpu_limit: InstructionSet | None = None,
    start_timeout_s: float = 300.0,
    lifetime_s: float | None = None,
    progress: Progress,
) -> Iterator[Server]:
    """Start a model server from ``image``, wait until ``/health`` answers 200, and remove the container afterwards.

    The container has a read-only root with a tmpfs on /tmp, no capabilities and no way to get any, an unprivileged
    user, at most ``memory_bytes`` (swap included) and `PROCESSES` processes, and its own isolated network: if the
    engine is local, only this machine reaches it, and it reaches nothing (`containers.sandbox.isolation`). Container
    and network are removed at the end of the block, also after SIGTERM in the main thread; after SIGKILL `sweep` finds
    them by their labels. The server's log is saved in ``home/logs`` without prompts (`containers.sandbox.logs`).

    Args:
        client: the engine to run on.
        image: the image's id or digest.
        name: the start of the container's name; a random suffix makes it unique.
        home: the state folder that the container belongs to.
        memory_bytes: the memory limit.
        cpus: the CPU limit in CPUs; None for no limit.
        labels: labels in addition to those of `ownership`.
        environment: variables for the server.
        command: arguments in place of the image's own.
        mounts: folders of the engine's machine → paths in the container, read-only.
        gpus: devices, by index or UUID, each for one rank of the engine.
        cores: this machine's cores to reserve for the engine's ranks, if the engine is local; None to reserve none.
        cpu_limit: the instruction set that the server may use at most.
        start_timeout_s: how long the server may take until it is healthy.
        lifetime_s: seconds after which the container is killed; None for never.
        progress: called with lines about the wait.

    Raises:
        UnhealthyError: it stopped, or was not healthy in time.
        SandboxError: it could not be started, or ``image`` is a tag.
    """
    if "sha256:" not in image:
        raise SandboxError(f"`{image}` is a tag, which can point to another image later: use the image's id or digest")
    gpu_compatibility.check(client, image, gpus)
    full_name = f"{name}-{uuid.uuid4().hex[:8]}"
    with (
        terminated_by_exception(),
        marked(home, full_name),
        isolation.network(client, full_name, ownership(home)) as network,
        _reserved(client, cores, progress) as given,
    ):
        started, kept = time.monotonic(), home / "logs"
        ranks = max(1, len(gpus), 1 if cores is None else cores.ranks)
        container = create(client, image, {
            "name": full_name,
            "labels": {**(labels or {}), **ownership(home)},
            "environment": {**_ENVIRONMENT, **_limited_to(cpu_limit), **_bound_to(given, 1 if gpus else ranks),
                            **(environment or {})},
            "command": None if command is None else list(command),
            "volumes": {str(path): {"bind": place, "mode": "ro"} for path, place in (mounts or {}).items()},
            "device_requests": [DeviceRequest(device_ids=list(gpus), capabilities=[["gpu"]])] if gpus else None,
            "cpuset_cpus": None if given is None else given.cpuset,
            "nano_cpus": None if cpus is None else round(cpus * 1e9),
            **hardening(memory_bytes, ranks),
            **_reached_by(network),
        })  # fmt: skip
        try:
            sealed = _start(container)
            reach = isolation.PUBLISHED if network is None else isolation.ISOLATED if sealed else isolation.UNSEALED
            if not sealed:
                progress(f"the sandbox's network is {reach}")
            read, source = container_reader(container, gpus)
            sampler = MemorySampler(read, source)
            sampler.start()
            try:
                try:
                    url = _wait(container, started, start_timeout_s, progress, kept)
                except UnhealthyError as error:
                    if lost := disappeared(gpus):
                        raise UnhealthyError(f"the server {lost}") from error
                    raise
                seconds = time.monotonic() - started
                progress(f"the server is healthy after {seconds:.1f} s")
                sampler.phase = "idle"
                found, report = _reported(container)
                with _ended_after(container, lifetime_s):
                    yield Server(
                        url, seconds, memory_bytes, cpus, sampler, lambda: failure.stopped(container, kept), container,
                        tuple(gpus), ranks, reach, start_timeout_s, given,
                        None if given is None else this_cpu(cpu_limit), found,
                        lambda: failure.failing(container, kept), kept, report,
                    )  # fmt: skip
            finally:
                sampler.stop()
        finally:
            try:
                logs.keep(container, kept)
            finally:
                remove(container)


def _reserved(
    client: docker.DockerClient, cores: CoreRequest | None, progress: Progress
) -> contextlib.AbstractContextManager[Cores | None]:
    """Reserve cores of this machine; the cores of a remote engine's machine are unknown."""
    if cores is None or not isolation.is_local(client):
        return contextlib.nullcontext()
    return core_pool.reserved(cores, progress)


def _reported(container: Container) -> tuple[Kernels | None, EngineReport | None]:
    """Read the engine's log once: the CPU runtime's line about kernels, and what vLLM says."""
    try:
        log = kernels.head(container.logs(stream=True, follow=False))
    except (docker.errors.APIError, requests.RequestException):
        return None, None
    found = kernels.find(log)
    return found, engine_report.read(log.decode(errors="replace"), found)


def _bound_to(cores: Cores | None, ranks: int) -> dict[str, str]:
    """Bind a CPU engine to its cores; the ranks of one on another machine are left to the kernel."""
    if cores is None:
        return {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if ranks > 1 else {}
    return {"VLLM_CPU_OMP_THREADS_BIND": cores.binding}


def _limited_to(instruction_set: InstructionSet | None) -> dict[str, str]:
    """Return the variable that the runtimes' `slipway_torch.py` reads."""
    return {} if instruction_set is None else {"SLIPWAY_CPU_ISA": instruction_set}


def sweep(client: docker.DockerClient, home: Path) -> list[str]:
    """Remove the containers and networks of ``home`` whose process on this machine has ended.

    Returns:
        The names of the removed containers.
    """
    markers = left_behind(home)
    labels = [f"{HOME_LABEL}={home_digest(home)}", f"{HOST_LABEL}={socket.gethostname()}", OWNER_LABEL]
    swept = []
    for container in client.containers.list(all=True, filters={"label": labels}, ignore_removed=True):
        if not is_alive(container.labels[OWNER_LABEL]):
            remove(container)
            swept.append(str(container.name))
    for network in client.networks.list(filters={"label": labels}):
        if not is_alive(network.attrs["Labels"][OWNER_LABEL]):
            isolation.remove(network)
    for marker in markers:
        marker.unlink(missing_ok=True)
    return swept


def _reached_by(network: str | None) -> dict[str, Any]:
    """Return the options of the container's network, or of a port on loopback if there is none."""
    if network is None:
        return {"ports": {PORT: ("127.0.0.1", None)}}
    return {"network": network, "dns": [isolation.NO_DNS]}


@contextlib.contextmanager
def _ended_after(container: Container, seconds: float | None) -> Iterator[None]:
    """Kill the container after so many seconds, so that a hanging server does not occupy the machine."""
    if seconds is None:
        yield
        return

    def kill() -> None:
        with contextlib.suppress(docker.errors.APIError, requests.RequestException):
            container.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _start(container: Container) -> bool:
    """Start a container; return whether its network is sealed, also from this machine's services."""
    with (
        engine_errors(f"can't start a container of {container.attrs['Image']}"),
        isolation.unplugged(container) as seal,
    ):
        container.start()
        return seal()


def _wait(container: Container, started: float, timeout: float, progress: Progress, kept: Path | None) -> str:
    """Wait for a healthy answer and return the server's URL; raise UnhealthyError if none comes."""
    told = started
    url: str | None = None
    with httpx.Client(timeout=2.0, trust_env=False) as http:
        while True:
            died = failure.stopped(container, kept)
            if died is not None:
                raise UnhealthyError(f"the server {died.told(' before it was healthy')}")
            url = url or _address(container)
            if url is not None and _healthy(http, url):
                return url
            now = time.monotonic()
            if now - started > timeout:
                late = failure.with_error(container, f"was not healthy within {timeout:.0f} s", kept)
                raise UnhealthyError(f"the server {late}")
            if now - told > _PROGRESS_SECONDS:
                told = now
                progress(f"waiting for the server, {now - started:.0f} s")
            time.sleep(_POLL_SECONDS)


def _healthy(http: httpx.Client, url: str) -> bool:
    try:
        return http.get(f"{url}/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _address(container: Container) -> str | None:
    """Return the URL of the container's port, at its own address or published; None until the engine assigns one."""
    settings = container.attrs["NetworkSettings"]
    bindings = (settings.get("Ports") or {}).get(PORT) or []
    if bindings:
        return f"http://127.0.0.1:{bindings[0]['HostPort']}"
    own = next((each["IPAddress"] for each in settings["Networks"].values() if each.get("IPAddress")), None)
    return f"http://{own}:{PORT.partition('/')[0]}" if own else None
