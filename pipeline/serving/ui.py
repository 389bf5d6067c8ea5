"""``slipway ui``: Dagster's and MLflow's web servers on loopback, until Ctrl-C."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from pipeline.errors import SpecError
from pipeline.orchestration.instance import fail_orphaned_runs, open_instance, storage_variables
from pipeline.orchestration.partitions import add_partitions
from pipeline.orchestration.release import sweep
from pipeline.resources import PACKAGES, RESOURCES
from pipeline.serving.guard import ORIGINS, REFUSED
from pipeline.serving.servers import ServerProcess, ServerProcessError, run
from pipeline.settings import Settings
from pipeline.spec import load
from registry.file_locks import locked
from registry.progress import Progress
from registry.tracking import prepare, shown

# Warnings of Dagster's own that would appear in every log: `dagster dev` has a successor, its log handlers are a
# preview.
_KNOWN = "ignore:Function `dev_command` is superseded,ignore:Handling yaml-defined logging"
# Seconds that a tick of a sensor or schedule may take: it asks hubs, which may be slow, and may read weights.
_TICK_TIMEOUTS = {"DAGSTER_SENSOR_GRPC_TIMEOUT_SECONDS": "600", "DAGSTER_SCHEDULE_GRPC_TIMEOUT_SECONDS": "600"}
# The current folder may contain folders with the names of our packages.
_OWN_PACKAGES = {"PYTHONSAFEPATH": "1"}
_LOCATIONS = """{ workspaceOrError { __typename ... on PythonError { message } ... on Workspace { locationEntries {
    locationOrLoadError { __typename ... on PythonError { message } } } } } }"""


def serve(settings: Settings, port: int, progress: Progress) -> None:
    """Serve Dagster on ``port`` and MLflow on the next, until interrupted.

    First add the partitions of every valid model file to Dagster, and mark runs whose process is dead as failed. If
    `MLFLOW_TRACKING_URI` names a server, its address is shown and no MLflow server is started.

    Raises:
        ServerProcessError: another `slipway ui` serves the home, a port is taken, or a server does not start or ends
        unexpectedly.
    """

    def refuse() -> None:
        raise ServerProcessError(
            f"another `slipway ui` serves {settings.home}: end it, or set SLIPWAY_HOME to another folder"
        )

    settings.home.mkdir(parents=True, exist_ok=True)
    # Two daemons on one home would start each queued run twice.
    with locked(settings.home / "ui.lock", waiting=refuse):
        _serve(settings, port, progress)


def _serve(settings: Settings, port: int, progress: Progress) -> None:
    with open_instance(settings) as instance:
        for path in sorted(settings.models.glob("*.yaml")):
            try:
                add_partitions(instance, load(path))
            except SpecError as error:
                progress(f"ignored: {error}")
        sweep(settings)
        fail_orphaned_runs(instance, settings)
    prepare(settings.tracking_uri)
    remote = settings.tracking_uri.startswith("http")
    servers = [_dagster(settings, port), *([] if remote else [_mlflow(settings, port + 1)])]
    mlflow = shown(settings.tracking_uri) if remote else f"http://127.0.0.1:{port + 1}"
    addresses = f"Dagster  http://127.0.0.1:{port}\nMLflow   {mlflow}\nCtrl-C ends {'it' if remote else 'both'}"
    run(servers, progress, lambda: progress(addresses))


def _dagster(settings: Settings, port: int) -> ServerProcess:
    address = f"http://127.0.0.1:{port}"
    return ServerProcess(
        "Dagster",
        [
            *_guarded("dagster"),
            *("dev", "-m", "pipeline.definitions", "--working-directory", str(PACKAGES)),
            *("-h", "127.0.0.1", "-p", str(port)),
        ],
        {
            **os.environ,
            "SLIPWAY_UI_ADDRESS": os.environ.get("SLIPWAY_UI_ADDRESS") or address,
            "DAGSTER_HOME": str(_dagster_home(settings)),
            **storage_variables(settings),
            **_TICK_TIMEOUTS,
            "PYTHONWARNINGS": _KNOWN,
            **_OWN_PACKAGES,
            ORIGINS: _origins(port, os.environ.get("SLIPWAY_UI_ADDRESS")),
        },
        port,
        settings.home / "logs" / "dagster.log",
        lambda: _has_loaded(address) and _is_guarded("Dagster", address),
    )


def _dagster_home(settings: Settings) -> Path:
    """A folder of the home with a link to dagster.yaml; Dagster makes folders beside that file."""
    folder = settings.home / "dagster"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "dagster.yaml"
    link.unlink(missing_ok=True)
    link.symlink_to(RESOURCES / "dagster.yaml")
    return folder


def _has_loaded(address: str) -> bool:
    """Whether Dagster answers and has loaded the pipeline.

    Raises:
        ServerProcessError: it answers, but can't load the pipeline.
    """
    try:
        reply = httpx.post(f"{address}/graphql", json={"query": _LOCATIONS}, timeout=30, trust_env=False)
        workspace = reply.raise_for_status().json()["data"]["workspaceOrError"]
    except httpx.HTTPError:
        return False
    places = [entry["locationOrLoadError"] for entry in workspace.get("locationEntries", [])]
    for place in (workspace, *(place for place in places if place)):
        if place["__typename"] == "PythonError":
            raise ServerProcessError(f"Dagster can't load the pipeline: {place['message'].strip()}")
    return bool(places) and all(places)


def _mlflow(settings: Settings, port: int) -> ServerProcess:
    address = f"http://127.0.0.1:{port}"
    folder = settings.home / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    # It needs the store's credentials, but not the hub's or Slipway's.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SLIPWAY_"))}
    return ServerProcess(
        "MLflow",
        [
            *_guarded("mlflow"),
            *("server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            *("--default-artifact-root", str(folder / "artifacts")),
        ],
        {
            **inherited,
            # Not an argument: it may hold a password, and every user of this machine can read arguments.
            "MLFLOW_BACKEND_STORE_URI": settings.tracking_uri,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            **_OWN_PACKAGES,
            ORIGINS: _origins(port, settings.mlflow_address if os.environ.get("SLIPWAY_UI_ADDRESS") else None),
        },
        port,
        settings.home / "logs" / "mlflow.log",
        lambda: _answers(f"{address}/health") and _is_guarded("MLflow", address),
    )


def _answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _is_guarded(name: str, address: str) -> bool:
    """Whether a server is guarded (`pipeline.serving.guard`): asks it under a foreign host name, as DNS rebinding does.

    Raises:
        ServerProcessError: it does not refuse the request.
    """
    try:
        reply = httpx.get(f"{address}/", headers={"Host": "slipway.invalid"}, timeout=30, trust_env=False)
    except httpx.HTTPError:
        return False
    if reply.status_code != httpx.codes.FORBIDDEN or not reply.text.startswith(REFUSED):
        raise ServerProcessError(
            f"{name} answers requests of any web page: this version can't be guarded; install the pinned one"
        )
    return True


def _origins(port: int, address: str | None) -> str:
    """The origins of a server on this port, and of the proxy in front of it, if any."""
    return ",".join([f"http://127.0.0.1:{port}", f"http://localhost:{port}", *([_origin(address)] if address else [])])


def _origin(address: str) -> str:
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc}"


def _guarded(program: str) -> list[str]:
    return [sys.executable, "-m", "pipeline.serving.guarded", program]
