"""Checks whether this machine can release, part by part, with a remedy for each problem; installs missing parts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from containers.engine import engine
from containers.errors import ContainerError
from containers.hardware.gpu import gpus
from containers.scan import trivy
from pipeline.compatibility.backends import METHODS
from pipeline.compatibility.scheme import Scheme
from pipeline.settings import Settings
from pipeline.workers.environments import ENVIRONMENTS, ensure_environment, environment_folder
from registry import tracking
from registry.errors import TrackingError
from registry.progress import Progress

FIX = "slipway doctor --fix"
_FREE_GIB = 20


@dataclass(frozen=True)
class Finding:
    """The state of one part of the machine: ``missing`` prevents a release, ``warning`` limits it."""

    part: str
    status: Literal["ok", "warning", "missing"]
    found: str
    remedy: str = ""


def examine(settings: Settings) -> list[Finding]:
    """Check everything that a release needs, without changing anything."""
    return [
        _engine(settings),
        _cpu(settings),
        _gpu(),
        _trivy(settings),
        _database(settings),
        _disk(settings),
        *(_environment(name, settings) for name in ENVIRONMENTS),
        _mlflow(settings),
    ]


def repair(settings: Settings, progress: Progress, environments: Sequence[str] = ENVIRONMENTS) -> None:
    """Start a container engine, make the environments, and update Trivy's database if one is configured.

    Raises:
        ContainerError, WorkerFailed: a part can't be installed; says what to install by hand.
    """
    engine.ensure(settings.docker_host, settings.home, progress).close()
    for name in environments:
        ensure_environment(name, settings, progress)
    trivy.find_trivy()
    if settings.trivy_database:
        network = settings.installer_environment
        trivy.update_database(settings.home, settings.trivy_database, progress, variables=network)


def _engine(settings: Settings) -> Finding:
    try:
        client = engine.connect(settings.docker_host, settings.home)
    except ContainerError as error:
        return Finding("engine", "missing", str(error), FIX)
    version = client.version()
    found = f"Docker {version['Version']} at {trivy.engine_variables(client)['DOCKER_HOST']}"
    client.close()
    return Finding("engine", "ok", found)


def _cpu(settings: Settings) -> Finding:
    cpu = settings.cpu
    found = f"{cpu.model}, {cpu.cores} logical CPUs; {cpu.meaning}"
    if cpu.refusal is not None:
        # The CPU does not matter for a GPU runtime, or if the engine runs on another machine.
        elsewhere = bool(gpus()) or not settings.engine_is_here
        return Finding("cpu", "warning" if elsewhere else "missing", found, cpu.refusal)
    unserved = [
        f"`{method}`"
        for method, (backend, *_) in METHODS.items()
        if Scheme.model_validate({"method": method, "backend": backend}).unsupported(cpu.instruction_set)
    ]
    found += f"; vLLM serves all methods on it but {', '.join(unserved)}"
    if cpu.bfloat16:
        return Finding("cpu", "ok", found)
    return Finding("cpu", "warning", found, "a CPU with AVX-512 and bfloat16 is faster")


def _gpu() -> Finding:
    found = gpus()
    if not found:
        return Finding(
            "gpu", "warning", "none: models run on the CPU", "only AutoGPTQ needs a GPU: use gptqmodel instead"
        )
    return Finding("gpu", "ok", ", ".join(f"{gpu.name}, driver {gpu.driver}" for gpu in found))


def _trivy(_settings: Settings) -> Finding:
    try:
        return Finding("trivy", "ok", f"{trivy.VERSION}, sha256 as pinned, {trivy.find_trivy()}")
    except ContainerError as error:
        return Finding("trivy", "missing", str(error), "rm .venv/.pins, then `make demo`")


def _database(settings: Settings) -> Finding:
    database = trivy.database(settings.home)
    if database.is_usable:
        return Finding("trivy database", "ok", f"updated {database.updated_at}")
    found = database.damage or "absent: no vulnerabilities can be found"
    return Finding("trivy database", "warning", found, f"SLIPWAY_TRIVY_DATABASE=REPOSITORY {FIX}")


def _disk(settings: Settings) -> Finding:
    place = settings.home
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    status: Literal["ok", "warning"] = "ok" if free >= _FREE_GIB else "warning"
    return Finding(
        "disk",
        status,
        f"{free:.0f} GiB free for {settings.home}",
        "" if status == "ok" else "free some space, or move SLIPWAY_HOME",
    )


def _environment(name: str, settings: Settings) -> Finding:
    folder = environment_folder(name, settings.home)
    if folder.is_dir():
        return Finding(f"worker {name}", "ok", folder.name)
    return Finding(f"worker {name}", "warning", "not made yet", f"made on first use, or now with {FIX}")


def _mlflow(settings: Settings) -> Finding:
    uri = settings.tracking_uri
    try:
        tracking.reach(uri)
    except TrackingError as error:
        return Finding("mlflow", "missing", str(error), "start the server, or unset MLFLOW_TRACKING_URI")
    return Finding("mlflow", "ok", tracking.shown(uri))
