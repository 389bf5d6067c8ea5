"""The container engine: a running one, or a private ``dockerd`` under ``$SLIPWAY_HOME/docker``."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import docker
import requests

from containers.engine import private_engine
from containers.errors import EngineError
from containers.hardware import machine_locks
from registry.file_locks import locked
from registry.progress import Progress

DEFAULT_SOCKET = Path("/var/run/docker.sock")
PING_SECONDS = 10
# A build step may send nothing for minutes (pip unpacking a gigabyte); the SDK's default of 60 s would end it.
REQUEST_SECONDS = 1800


def connect(docker_host: str | None, home: Path, *, certificates: Path | None = None) -> docker.DockerClient:
    """Return a client of the first engine that answers.

    If ``docker_host`` (``DOCKER_HOST``) is given, only that engine is tried; ``certificates`` (``DOCKER_CERT_PATH``)
    is its folder of TLS certificates. Else the default socket is tried, then the private engine of ``home``.

    Raises:
        EngineError: none answers; the message says what to do.
    """
    if docker_host:
        return _client(docker_host, certificates)
    reasons = []
    for socket in (DEFAULT_SOCKET, private_engine.paths(home).socket):
        if not socket.exists():
            continue
        try:
            return _client(f"unix://{socket}", None)
        except EngineError as error:
            reasons.append(str(error))
    if reasons:
        raise EngineError(f"{'; '.join(reasons)}; `slipway doctor --fix` starts a private engine if possible")
    raise EngineError(
        "no container engine is running: start Docker, set DOCKER_HOST, or run `slipway doctor --fix` "
        "(as root on Debian or Ubuntu it starts a private one)"
    )


def ensure(
    docker_host: str | None, home: Path, progress: Progress, *, certificates: Path | None = None
) -> docker.DockerClient:
    """Return a client of an engine; if none answers, install and start a private one.

    The private engine needs root on Debian or Ubuntu. Its data, socket, log and pid file are under ``home/docker``.
    It continues after this process ends, until :func:`stop`. Concurrent calls start one engine.

    Raises:
        EngineError: no engine answers and none can be started here; the message says what to install.
    """
    try:
        return connect(docker_host, home, certificates=certificates)
    except EngineError as error:
        if docker_host:
            raise
        _refuse_unless_possible(error)
    private_engine.check_socket_length(home)
    with _locked(home):
        with contextlib.suppress(EngineError):
            return connect(None, home)
        if shutil.which("dockerd", path=private_engine.SYSTEM_PATH) is None:
            install_packages(["docker.io"], progress)
        if shutil.which("ip", path=private_engine.SYSTEM_PATH) is None:
            install_packages(["iproute2"], progress)
        private_engine.start(home, progress)
    return connect(None, home)


def stop(home: Path, progress: Progress) -> bool:
    """Stop the private engine of ``home`` with its containers, mounts and network; return whether one ran.

    Images stay under ``home/docker`` for the next start. Other engines are never stopped.
    """
    if not private_engine.paths(home).root.exists():
        return False
    with _locked(home):
        return private_engine.stop(home, progress)


def install_packages(names: Sequence[str], progress: Progress) -> None:
    """Install Debian packages with apt-get, without recommended packages and without starting services.

    A machine-wide lock admits one process at a time: apt-get does not wait for another one, and
    `_services_not_started` changes a file of the machine.

    Raises:
        EngineError: this process is not root on Debian or Ubuntu, or apt-get failed (the message has its last line).
    """
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise EngineError(
            f"`{' '.join(names)}` is not installed: install it, or run as root on Debian or Ubuntu to have it installed"
        )
    progress(f"installing {' '.join(names)} with apt-get")
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *names]
    waiting = lambda: progress("waiting for another installation of packages")  # noqa: E731
    package_lock = machine_locks.locked(machine_locks.default_folder(), machine_locks.PACKAGES, waiting)
    with package_lock, _services_not_started():
        if _apt(install).returncode == 0:
            return
        # The package lists may be missing (a fresh container) or older than the mirror.
        progress("refreshing the package lists with apt-get update")
        for command in (["apt-get", "update", "-q"], install):
            done = _apt(command)
            if done.returncode != 0:
                last = ([line for line in done.stdout.splitlines() if line.strip()] or ["no output"])[-1]
                raise EngineError(f"`{' '.join(command)}` failed: {last.strip()}")


def _client(host: str, certificates: Path | None) -> docker.DockerClient:
    """Open a client of an engine that answers, or raise EngineError with the reason in one line."""
    client = None
    tls: docker.tls.TLSConfig | bool = False
    try:
        if host.startswith("unix://"):
            private_engine.knock(Path(host.removeprefix("unix://")))
        if certificates is not None:
            tls = docker.tls.TLSConfig(
                client_cert=(str(certificates / "cert.pem"), str(certificates / "key.pem")),
                ca_cert=str(certificates / "ca.pem"),
                verify=True,
            )
        client = docker.DockerClient(
            base_url=host, tls=tls, timeout=PING_SECONDS, version="auto", use_ssh_client=host.startswith("ssh:")
        )
        client.ping()
    except (docker.errors.DockerException, requests.RequestException, OSError, ValueError) as error:
        if client is not None:
            client.close()
        raise EngineError(f"the container engine at {host} does not answer ({_plain(error)})") from error
    client.api.timeout = REQUEST_SECONDS
    return client


def _plain(error: BaseException) -> str:
    """Return the reason of the SDK's chained exceptions in a few words."""
    text = str(error)
    for known, words in {
        "PermissionError": "permission denied: join the `docker` group or run as root",
        "ConnectionRefusedError": "connection refused: is it running?",
        "Connection refused": "connection refused: is it running?",
        "FileNotFoundError": "no such socket",
        "No such file or directory": "no such socket",
        "Permission denied": "permission denied: join the `docker` group or run as root",
        "Name or service not known": "unknown host",
        "timed out": "timed out",
    }.items():
        if known in text:
            return words
    return text.splitlines()[0][:200] if text else type(error).__name__


def _refuse_unless_possible(reason: EngineError) -> None:
    """Raise EngineError with what to install, unless this is root on Debian or Ubuntu."""
    if os.geteuid() == 0 and shutil.which("apt-get") is not None:
        return
    installed = shutil.which("dockerd", path=private_engine.SYSTEM_PATH) is not None
    remedy = (
        "start it (`sudo systemctl start docker`)"
        if installed
        else "install Docker (`sudo apt-get install docker.io` on Debian or Ubuntu) and start it"
    )
    raise EngineError(f"no container engine answers: {remedy}, or set DOCKER_HOST") from reason


def _apt(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run apt-get non-interactively; stdout and stderr are returned together."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    return subprocess.run(
        command, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip


@contextlib.contextmanager
def _services_not_started() -> Iterator[None]:
    """Keep a package from starting the system's service, because the private engine is used instead.

    Debian's mechanism is a ``/usr/sbin/policy-rc.d`` that exits with 101. An existing file is left alone.
    """
    policy = Path("/usr/sbin/policy-rc.d")
    try:
        descriptor = os.open(policy, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o755)
    except FileExistsError:
        yield
        return
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write("#!/bin/sh\nexit 101\n")
        yield
    finally:
        policy.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Let one process at a time start or stop the private engine of ``home``."""
    root = private_engine.paths(home).root
    root.mkdir(parents=True, exist_ok=True, mode=0o711)
    with locked(root / "lock"):
        yield
