"""A place to try an image in: started hardened, on loopback only, watched, and removed whatever happens."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
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
from containers.errors import ContainerError
from containers.hardware import core_pool
from containers.hardware.core_pool import CoreRequest, Cores
from containers.hardware.cpu import Cpu, InstructionSet, this_cpu
from containers.image import gpu_compatibility
from containers.sandbox import engine_log, isolation, kernels, logs
from containers.sandbox.engine_log import Failure
from containers.sandbox.kernels import ComputedOn, Kernels
from containers.sandbox.memory import MemorySampler, container_reader

Progress = Callable[[str], None]

STAGE_LABEL = "slipway.stage"

PORT = "8000/tcp"
USER = "65534:65534"
PROCESSES = 1024
SHARED_MEMORY = "1g"
# vLLM asks for its own address by a route to the outside, which there is none of here. An illegal instruction in one of
# its processes leaves no trace but what Python's fault handler writes.
_ENVIRONMENT = {"HOME": "/tmp", "VLLM_HOST_IP": "127.0.0.1", "PYTHONFAULTHANDLER": "1"}  # noqa: S108 - inside the container
_POLL_SECONDS = 0.25
_PROGRESS_SECONDS = 10.0


class SandboxError(ContainerError):
    """A container did not start, did not get healthy in time, or died; the message says why and where its log is."""


class UnhealthyError(SandboxError):
    """The server itself died before it was healthy, or was not healthy in time: the release's fault."""


@dataclass
class Server:
    """A healthy server in the sandbox.

    ``started_seconds`` counts from the container's creation to its first healthy answer. ``died`` says how it ended and
    why, or None while it runs; ``failing`` says what is wrong with one that runs. ``network`` says how far the
    container can see. ``url`` may change when it is restarted. ``cores`` are those of this machine that it was given,
    where it was given some by number, and ``cpu`` is what they belong to; ``kernels`` are what its engine says of
    itself. What it wrote is kept in the folder ``logs``.
    """

    url: str
    started_seconds: float
    memory_bytes: int
    cpus: float | None
    memory: MemorySampler
    died: Callable[[], Failure | None]
    container: Container | None = None
    gpu: str | None = None
    network: str | None = None
    start_timeout_s: float = 300.0
    cores: Cores | None = None
    cpu: Cpu | None = None
    kernels: Kernels | None = None
    failing: Callable[[], Failure | None] = lambda: None
    logs: Path | None = None

    def failed(self) -> Failure | None:
        """How it ended, or, where it runs, what its log says of an engine that is dead; None where all is well."""
        return self.died() or self.failing()

    @property
    def computed_on(self) -> ComputedOn:
        """What computes its answers; what its engine says of the CPU counts more than what this machine knows."""
        cpu: dict[str, Any] = {}
        if self.cpu is not None:
            cpu = {"cpu_model": self.cpu.model, "instruction_set": self.cpu.instruction_set}
        if self.cores is not None:
            cpu |= {"cores": self.cores.numbers, "cores_shared": self.cores.shared}
        if self.kernels is not None:
            cpu |= self.kernels.model_dump(include={"cpu_model", "instruction_set"})
        return ComputedOn(gpu=self.gpu, kernels=self.kernels, **cpu)

    def restart(self) -> None:
        """Start the container again, killed or not, and wait until it is healthy.

        Raises:
            SandboxError: it has none, does not start, or is not healthy in time.
        """
        if self.container is None:
            raise SandboxError("this server is no container's: it can't be restarted")
        with told(f"can't restart the container {self.container.name}"), isolation.unplugged(self.container) as seal:
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
    gpu: str | None = None,
    cores: CoreRequest | None = None,
    cpu_limit: InstructionSet | None = None,
    start_timeout_s: float = 300.0,
    lifetime_s: float | None = None,
    progress: Progress,
) -> Iterator[Server]:
    """Start a model server from ``image``, wait until ``/health`` answers 200, and remove the container afterwards.

    The container has a read-only root with a tmpfs on /tmp, no capabilities and no way to get any, an unprivileged
    user, at most ``memory_bytes`` (swap included) and `PROCESSES` processes, and a network of its own that leads
    nowhere: only this machine reaches it, and it reaches nothing, where the engine is this machine's own
    (`containers.sandbox.isolation`). Container and network are removed on every way out of the block, SIGTERM in the
    main thread included; after a SIGKILL `sweep` finds them by their labels. What the server wrote is kept in
    ``home/logs``, without prompts (`containers.sandbox.logs`).

    Args:
        client: the engine to run on.
        image: what to run, by id or digest.
        name: a stem for the container's name; a random suffix keeps it unique.
        home: the state folder whose container this is.
        memory_bytes: the memory limit.
        cpus: the limit in CPUs, or None for all.
        labels: labels beside those of this module.
        environment: variables for the server.
        command: arguments in place of the image's own.
        mounts: folders of the engine's machine, by where they appear in the container, read-only.
        gpu: a device, by index or UUID, or None.
        cores: which of this machine's cores to reserve for it, where the engine is this machine's; None for no choice.
        cpu_limit: what the CPU is to behave as, where it has more.
        start_timeout_s: how long the server may take to get healthy.
        lifetime_s: when the container is killed, whatever it does; None for never.
        progress: told about the wait.

    Raises:
        UnhealthyError: it died, or was not healthy in time.
        SandboxError: it could not be started, or ``image`` is a name that may move.
    """
    if "sha256:" not in image:
        raise SandboxError(f"`{image}` is a name that may move: run an image by its id or digest")
    gpu_compatibility.check(client, image, gpu)
    full_name = f"{name}-{uuid.uuid4().hex[:8]}"
    with (
        terminated_by_exception(),
        marked(home, full_name),
        isolation.network(client, full_name, ownership(home)) as network,
        _reserved(client, cores, progress) as given,
    ):
        started, kept = time.monotonic(), home / "logs"
        container = create(client, image, {
            "name": full_name,
            "labels": {**(labels or {}), **ownership(home)},
            "environment": {**_ENVIRONMENT, **_limited_to(cpu_limit), **_bound_to(given), **(environment or {})},
            "command": None if command is None else list(command),
            "volumes": {str(path): {"bind": place, "mode": "ro"} for path, place in (mounts or {}).items()},
            "device_requests": None if gpu is None else [DeviceRequest(device_ids=[gpu], capabilities=[["gpu"]])],
            "cpuset_cpus": None if given is None else given.cpuset,
            "nano_cpus": None if cpus is None else round(cpus * 1e9),
            **hardening(memory_bytes),
            **_reached_by(network),
        })  # fmt: skip
        try:
            sealed = _start(container)
            reach = isolation.PUBLISHED if network is None else isolation.ISOLATED if sealed else isolation.UNSEALED
            if not sealed:
                progress(f"the sandbox's network is {reach}")
            read, source = container_reader(container, gpu)
            sampler = MemorySampler(read, source)
            sampler.start()
            try:
                url = _wait(container, started, start_timeout_s, progress, kept)
                seconds = time.monotonic() - started
                progress(f"the server is healthy after {seconds:.1f} s")
                sampler.phase = "idle"
                with _ended_after(container, lifetime_s):
                    yield Server(
                        url, seconds, memory_bytes, cpus, sampler, lambda: _how_it_died(container, kept), container,
                        gpu, reach, start_timeout_s, given,
                        None if given is None else this_cpu(cpu_limit), _kernels(container),
                        lambda: _how_it_fails(container, kept), kept,
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
    """Reserve cores of this machine; of another machine's, behind a remote engine, nothing is known."""
    if cores is None or not isolation.is_local(client):
        return contextlib.nullcontext()
    return core_pool.reserved(cores, progress)


def _kernels(container: Container) -> Kernels | None:
    try:
        return kernels.find(container.logs(stream=True, follow=False))
    except (docker.errors.APIError, requests.RequestException):
        return None  # what is not known is not recorded


def _bound_to(cores: Cores | None) -> dict[str, str]:
    return {} if cores is None else {"VLLM_CPU_OMP_THREADS_BIND": cores.cpuset}


def _limited_to(instruction_set: InstructionSet | None) -> dict[str, str]:
    """What the runtimes' `slipway_torch.py` reads."""
    return {} if instruction_set is None else {"SLIPWAY_CPU_ISA": instruction_set}


def sweep(client: docker.DockerClient, home: Path) -> list[str]:
    """Remove the containers and networks of ``home`` that a process of this machine did not live to remove.

    Returns:
        The containers' names.
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


def hardening(memory_bytes: int) -> dict[str, Any]:
    """What every container of ours is held to, as the SDK takes it."""
    return {
        "read_only": True,
        "tmpfs": {"/tmp": "rw,exec,nosuid,nodev,mode=1777"},  # noqa: S108 - inside the container
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "user": USER,
        "pids_limit": PROCESSES,
        "mem_limit": memory_bytes,
        "memswap_limit": memory_bytes,
        "shm_size": SHARED_MEMORY,
    }


def _reached_by(network: str | None) -> dict[str, Any]:
    """Where its port is: on a network of its own, or published on loopback where there is none."""
    if network is None:
        return {"ports": {PORT: ("127.0.0.1", None)}}
    return {"network": network, "dns": [isolation.NO_DNS]}


@contextlib.contextmanager
def _ended_after(container: Container, seconds: float | None) -> Iterator[None]:
    """Kill the container after so many seconds: a server that hangs must not hold the machine."""
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


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Turn the engine's errors into this module's."""
    try:
        yield
    except (docker.errors.APIError, requests.RequestException) as error:
        raise SandboxError(f"{what}: {_explanation(error)}") from error


def create(client: docker.DockerClient, image: str, options: dict[str, Any]) -> Container:
    """Create a container; ``SandboxError`` where the engine can't, or has no such image."""
    try:
        with told(f"can't create a container of {image}"):
            return client.containers.create(image, **options)
    except SandboxError as error:
        if isinstance(error.__cause__, docker.errors.ImageNotFound):
            raise SandboxError(f"the engine has no image {image}: build it again") from error
        raise


def _start(container: Container) -> bool:
    """Start a container; return whether it can reach nothing, this machine's services included."""
    with told(f"can't start a container of {container.attrs['Image']}"), isolation.unplugged(container) as seal:
        container.start()
        return seal()


def _explanation(error: Exception) -> str:
    return str(getattr(error, "explanation", None) or error)


def _wait(container: Container, started: float, timeout: float, progress: Progress, kept: Path | None) -> str:
    """Wait for a healthy answer and return the server's URL; UnhealthyError where that doesn't come."""
    told = started
    url: str | None = None
    with httpx.Client(timeout=2.0, trust_env=False) as http:
        while True:
            died = _how_it_died(container, kept)
            if died is not None:
                raise UnhealthyError(f"the server {died.told(' before it was healthy')}")
            url = url or _address(container)
            if url is not None and _healthy(http, url):
                return url
            now = time.monotonic()
            if now - started > timeout:
                late = _with_reason(container, f"was not healthy within {timeout:.0f} s", kept)
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
    """The URL of the container's port: its own address, or the published one, once the engine has given it one."""
    settings = container.attrs["NetworkSettings"]
    bindings = (settings.get("Ports") or {}).get(PORT) or []
    if bindings:
        return f"http://127.0.0.1:{bindings[0]['HostPort']}"
    own = next((each["IPAddress"] for each in settings["Networks"].values() if each.get("IPAddress")), None)
    return f"http://{own}:{PORT.partition('/')[0]}" if own else None


def _how_it_died(container: Container, kept: Path | None) -> Failure | None:
    """Say how a container ended, and why; None while it runs. What it wrote is kept in ``kept``."""
    try:
        container.reload()
    except docker.errors.NotFound:
        return Failure("was removed by someone else", may_pass=True)
    except (docker.errors.APIError, requests.RequestException) as error:
        return Failure(f"can't be seen any more: the engine doesn't answer ({_explanation(error)})", may_pass=True)
    state = container.attrs["State"]
    if state["Running"]:
        return None
    status = state["ExitCode"]
    if state.get("OOMKilled"):
        return _with_reason(container, f"{_out_of_memory(container)}, exit status {status})", kept, explained=True)
    ending, may_pass = engine_log.by_status(status)
    return _with_reason(container, ending, kept, may_pass=may_pass, calm=status == 0)


def _how_it_fails(container: Container, kept: Path | None) -> Failure | None:
    """Say what is wrong with a container that runs: its engine is dead, or a process of it ran out of memory."""
    try:
        if _ran_out_of_memory(container):
            return _with_reason(container, f"{_out_of_memory(container)}, the rest still runs)", kept, explained=True)
        if not engine_log.is_dead(logs.read(container, _started(container))):
            return None
    except (docker.errors.APIError, requests.RequestException):
        return None
    return _with_reason(container, "failed", kept)


def _out_of_memory(container: Container) -> str:
    return f"ran out of memory (limit {container.attrs['HostConfig']['Memory'] / 2**30:.2f} GiB"


def _ran_out_of_memory(container: Container) -> bool:
    """Whether the kernel ended a process of a running container for want of memory since it was started.

    The engine says so of a container only when it ends.
    """
    assert container.client is not None  # noqa: S101 - it came from one
    wanted = {"container": container.id, "event": "oom"}
    until = f"{time.time():.9f}"  # of now: the engine waits for a time to come
    since = int(_started(container))
    told = container.client.api.events(since=since, until=until, filters=wanted)  # type: ignore[call-overload] # a text
    return any(True for _ in told)


def _started(container: Container) -> float:
    """When it was started last, in seconds since 1970: what it wrote before is of another life."""
    try:
        return datetime.fromisoformat(container.attrs["State"]["StartedAt"][:19] + "+00:00").timestamp()
    except ValueError:
        return 0.0


def _with_reason(
    container: Container, ending: str, kept: Path | None, *, may_pass: bool = False, explained: bool = False,
    calm: bool = False,
) -> Failure:  # fmt: skip
    """Add the engine's first error to how it ended, unless that explains it, and keep what it wrote.

    vLLM's API server takes its leave ``calm``ly, with status 0, when the engine behind it has failed.
    """
    try:
        wrote = logs.read(container, _started(container))
    except (docker.errors.APIError, requests.RequestException):
        wrote = ""
    log = None if kept is None else logs.keep(container, kept)
    if explained:
        return Failure(ending, None, log)
    error = engine_log.root_error(wrote)
    if calm and engine_log.is_dead(wrote):
        ending, calm = "failed", False
    return Failure(ending, error, log, may_pass=calm or (may_pass and error is None))


def remove(container: Container) -> None:
    """Remove a container with its volumes; that it is gone already, or going, is as good."""
    try:
        container.remove(force=True, v=True)
    except docker.errors.NotFound:
        return
    except docker.errors.APIError as error:
        if "is already in progress" not in _explanation(error):
            raise SandboxError(f"can't remove the container {container.name}: {_explanation(error)}") from error


@contextlib.contextmanager
def terminated_by_exception() -> Iterator[None]:
    """Let SIGTERM unwind the stack for the time of the block, so that what was started is removed.

    Only in the main thread, where Python can, and only where nobody else handles the signal.
    """
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not ours:
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
