"""The gateway as a process: start it in its own environment, set its routes, read its state, drain it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError

from containers.engine.engine import connect
from containers.gateway import keys
from containers.gateway.config import GatewaySettings, Routes
from containers.gateway.state import GatewayPorts, GatewayState
from containers.image.gateway_image import gateway_program
from containers.image.program_image import ProgramImage, build_program_image
from containers.sandbox import engine_log
from pipeline.errors import SlipwayError
from pipeline.resources import PACKAGES, REQUIREMENTS
from pipeline.settings import Settings
from pipeline.workers.environments import ensure_environment
from registry.atomic_write import write_atomically
from registry.digests import digest_file
from registry.progress import Progress

_START_SECONDS = 30.0
_SWITCH_SECONDS = 10.0
_STOP_SLACK_S = 10.0
_MOST_BYTES = 1_000_000


class GatewayError(SlipwayError):
    """The gateway did not start, or ended by itself."""


def key_file(home: Path) -> Path:
    """The file of a home's API keys, which are kept as hashes."""
    return home / "gateway" / "keys.json"


def build_image(settings: Settings, progress: Progress) -> ProgramImage:
    """Build the gateway's image, push it if the settings name a registry, and record it in the home.

    Raises:
        ContainerError: the image can't be built or pushed.
    """
    client = connect(settings.docker_host, settings.home)
    program = gateway_program(REQUIREMENTS)
    built = build_program_image(client, program, settings.home, progress, registry=settings.image_registry)
    _image_file(settings.home).parent.mkdir(exist_ok=True)
    write_atomically(_image_file(settings.home), built.model_dump_json(indent=1))
    return built


def pushed_image(home: Path) -> str | None:
    """``REPOSITORY@sha256:…`` of the gateway image that this home pushed last; None if the gateway changed since."""
    try:
        built = ProgramImage.model_validate_json(_image_file(home).read_bytes())
    except (FileNotFoundError, ValidationError):  # not built yet, or built by another version of Slipway
        return None
    return built.reference if built.pushed and built.contents == gateway_program(REQUIREMENTS).contents else None


def _image_file(home: Path) -> Path:
    return home / "gateway" / "image.json"


@dataclass(frozen=True)
class GatewayProcess:
    """A running gateway; ``url`` is for clients, ``admin_url`` for operators.

    Earlier gateways wrote to the same ``log``; this one's lines begin ``log_begins`` bytes into it.
    """

    url: str
    admin_url: str
    process: subprocess.Popen[bytes]
    settings: GatewaySettings
    log: Path
    log_begins: int = 0

    def route(self, routes: Routes) -> None:
        """Set new routes, and return when they are in use.

        Raises:
            GatewayError: the gateway refused them, or ended.
        """
        write_atomically(self.settings.routes, routes.model_dump_json(indent=1))
        wanted = f"sha256:{digest_file(self.settings.routes)}"
        self._until(lambda state: state.routes == wanted, "use the new routes")

    def wait_ready(self, timeout_s: float = _SWITCH_SECONDS) -> None:
        """Wait until every model has a healthy replica; ``GatewayError`` after the timeout."""
        self._until(lambda state: state.ready, "find a healthy replica for every model", timeout_s)

    def wait_idle(self, replicas: set[str], timeout_s: float) -> bool:
        """Wait until these replicas have no request left; return False after the timeout."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            working = {replica.name for replica in self.state().replicas if replica.running}
            if not working & replicas:
                return True
            time.sleep(0.2)
        return False

    def state(self) -> GatewayState:
        """Return the gateway's own state; ``GatewayError`` if it ended."""
        try:
            answer = httpx.get(f"{self.admin_url}/replicas", timeout=5, trust_env=False)
            return GatewayState.model_validate_json(answer.content)
        except httpx.HTTPError as error:
            self.check()
            raise GatewayError(f"the gateway does not answer: {error}") from error

    def check(self) -> None:
        """Raise ``GatewayError`` with the first error of its log if it ended."""
        if self.process.poll() is not None:
            raise GatewayError(
                f"the gateway ended with status {self.process.returncode}: {_reason(self.log, self.log_begins)}"
            )

    def _until(self, done: Callable[[GatewayState], bool], what: str, timeout_s: float = _SWITCH_SECONDS) -> None:
        deadline = time.monotonic() + timeout_s
        while not done(self.state()):
            if time.monotonic() > deadline:
                raise GatewayError(
                    f"the gateway did not {what} within {timeout_s:g} s: {_reason(self.log, self.log_begins)}"
                )
            time.sleep(0.05)


@contextlib.contextmanager
def gateway(settings: Settings, folder: Path, progress: Progress, **options: Any) -> Iterator[GatewayProcess]:  # noqa: ANN401 - as GatewaySettings
    """Run a gateway with its files in ``folder``; ``options`` are its settings. It is drained after the block.

    It ends when this process ends, even if that is killed.

    Raises:
        GatewayError: it did not start; the message gives the reason and its log.
    """
    python = ensure_environment("gateway", settings, progress) / "bin" / "python"
    folder.mkdir(parents=True, exist_ok=True)
    announced = folder / "ports.json"
    announced.unlink(missing_ok=True)
    given = {"keys": key_file(settings.home), "routes": folder / "routes.json", "announce": announced, **options}
    configured = GatewaySettings.model_validate(given)
    keys.create(configured.keys)
    if not configured.routes.exists():
        write_atomically(configured.routes, Routes().model_dump_json())
    write_atomically(folder / "gateway.json", configured.model_dump_json(indent=1))
    command = ["setpriv", "--pdeathsig", "TERM", str(python), "-m", "containers.gateway"]
    log = folder / "gateway.log"
    with log.open("ab") as stream:
        begins = stream.tell()
        process = subprocess.Popen(
            [*command, "--config", str(folder / "gateway.json")],
            cwd=_modules(folder),
            env={**settings.child_environment, "PYTHONUNBUFFERED": "1", "PYTHONNOUSERSITE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            # In its own process group, so that Ctrl-C reaches it once, through this process.
            process_group=0,
        )
    try:
        ports = _announced(process, announced, log, begins)
        yield GatewayProcess(
            f"http://{configured.host}:{ports.port}",
            f"http://{configured.admin_host}:{ports.admin_port}",
            process,
            configured,
            log,
            begins,
        )
    finally:
        _end(process, configured.drain_delay_s + configured.drain_timeout_s + _STOP_SLACK_S)


def _modules(folder: Path) -> Path:
    """A folder with the gateway's own package alone: site-packages holds other versions of what it imports."""
    modules = folder / "modules"
    modules.mkdir(exist_ok=True)
    link = modules / "containers"
    link.unlink(missing_ok=True)
    link.symlink_to(PACKAGES / "containers")
    return modules


def _announced(process: subprocess.Popen[bytes], announced: Path, log: Path, begins: int) -> GatewayPorts:
    deadline = time.monotonic() + _START_SECONDS
    while not announced.exists():
        if process.poll() is not None:
            raise GatewayError(f"the gateway did not start: {_reason(log, begins)}")
        if time.monotonic() > deadline:
            raise GatewayError(f"the gateway did not start within {_START_SECONDS:g} s: {_reason(log, begins)}")
        time.sleep(0.02)
    return GatewayPorts.model_validate_json(announced.read_bytes())


def _end(process: subprocess.Popen[bytes], seconds: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _reason(log: Path, begins: int) -> str:
    """The first error in its log, and the log's path."""
    with log.open("rb") as stream:
        stream.seek(begins)
        text = stream.read(_MOST_BYTES).decode(errors="replace")
    return f"{engine_log.root_error(text) or 'no error in its log'}; log: {log}"
