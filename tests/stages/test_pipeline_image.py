"""The pipeline's image as `examples/cluster` runs it: hardened, without a network, beside an engine's socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from dagster import DagsterRunStatus
from docker.models.containers import Container

from checkout import CHECKOUT
from containers.engine import private_engine
from containers.engine.engine import DEFAULT_SOCKET
from homes import Slipway, make_home
from pipeline.orchestration.partitions import add_partitions
from pipeline.settings import Settings
from pipeline.spec import load
from stages.test_gateway import wait_until
from unit.pipeline.test_cluster import DEPLOYMENT, VALUES, cluster_instance, launched, object_named

pytestmark = pytest.mark.long

CONFIG = object_named("ConfigMap", "slipway")["data"]
PORT = str(DEPLOYMENT["port"])
# The values' securityContext in the engine's words.
HARDENED: dict[str, Any] = {"read_only": True, "security_opt": ["no-new-privileges"], "cap_drop": ["ALL"]}


@pytest.fixture(scope="module")
def image(machine: Settings, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image's id, as `slipway image pipeline` prints it."""
    slipway = Slipway(make_home(tmp_path_factory.mktemp("slipway") / "home", machine))
    done = slipway("image", "pipeline", "--json")
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["image_id"])


@pytest.fixture(scope="module")
def code_location(
    engine: docker.DockerClient, machine: Settings, image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Container]:
    """The container of the code location, with the arguments that the chart gives it."""
    home = tmp_path_factory.mktemp("cluster") / "home"
    (home / "dagster").mkdir(parents=True)
    for folder in (home, home / "dagster"):
        folder.chmod(0o777)
    workers = tmp_path_factory.mktemp("etc")
    sockets = (DEFAULT_SOCKET, private_engine.paths(machine.home).socket)
    socket = next(each for each in sockets if each.exists())
    place_of_socket = CONFIG["DOCKER_HOST"].removeprefix("unix://")
    places = {home: "/var/lib/slipway", workers: "/etc/slipway", socket: place_of_socket}
    environment = {**CONFIG, "DAGSTER_HOME": VALUES["global"]["dagsterHome"], "SLIPWAY_DAGSTER_POSTGRES": ""}
    container = engine.containers.run(
        image,
        ["dagster", "api", "grpc", "-h", "0.0.0.0", "-p", PORT, *DEPLOYMENT["dagsterApiGrpcArgs"]],  # noqa: S104 - its own network
        environment=environment,
        volumes={str(path): {"bind": place} for path, place in places.items()},
        tmpfs={"/tmp": "mode=1777"},  # noqa: S108 - inside the container
        group_add=[str(socket.stat().st_gid)],
        network_mode="none",
        detach=True,
        **HARDENED,
    )
    try:
        yield container
    finally:
        container.remove(force=True, v=True)


def said(container: Container, *command: str) -> tuple[int, str]:
    done = container.exec_run(list(command))
    assert isinstance(done.output, bytes)
    return done.exit_code or 0, done.output.decode()


def test_the_code_location_answers_the_charts_probe(code_location: Container) -> None:
    wait_until(lambda: said(code_location, "dagster", "api", "grpc-health-check", "-p", PORT)[0] == 0, 300)
    assert said(code_location, "id", "-u") == (0, "65534\n")


def test_the_definitions_are_valid_there(code_location: Container) -> None:
    status, output = said(code_location, "dagster", "definitions", "validate", "-m", "pipeline.definitions")
    assert status == 0, output


def test_the_command_works_there_and_finds_the_engine(code_location: Container) -> None:
    assert said(code_location, "slipway", "--version")[0] == 0
    status, output = said(code_location, "slipway", "doctor", "--json")
    (found,) = [each for each in json.loads(output) if "engine" in each["part"]]
    assert found["status"] == "ok", (status, output)


def test_it_runs_runs_and_workers_of_kubernetes(code_location: Container) -> None:
    modules = "import dagster_k8s, gcsfs, adlfs, pipeline.workers.launchers.node"
    assert said(code_location, "python", "-c", modules) == (0, "")
    # Workers' environments are made from this Python.
    made = said(code_location, "uv", "venv", "--offline", "-q", "--python", "/usr/bin/python3.11", "/tmp/venv")  # noqa: S108 - as above
    assert made == (0, "")


def test_a_run_of_the_launcher_is_executed_in_it(engine: docker.DockerClient, image: str, tmp_path: Path) -> None:
    """The Job's container, with the instance's storage in a folder of both, pulls the demo's source."""
    models, release = CHECKOUT / "models", {"dagster/partition/model": "demo", "dagster/partition/scheme": "gptq"}
    with cluster_instance(tmp_path) as instance:
        add_partitions(instance, load(models / "demo.yaml"))
        run_id, job = launched(instance, "source", tags={"dagster/partition": "demo|gptq", **release})
        for path in (tmp_path, *tmp_path.rglob("*")):
            path.chmod(0o777)
        (run,) = job["spec"]["template"]["spec"]["containers"]
        own = {name: str(tmp_path) for name in ("SLIPWAY_HOME", "SLIPWAY_DAGSTER_STORAGE")}
        given = {each["name"]: each["value"] for each in run["env"] if "value" in each}
        place = {**own, "SLIPWAY_MODELS": "/models", "SLIPWAY_WORKERS": "", "MLFLOW_TRACKING_URI": ""}
        output = engine.containers.run(
            image,
            run["args"],
            environment={**CONFIG, **given, **place, "SLIPWAY_DAGSTER_POSTGRES": ""},
            volumes={str(tmp_path): {"bind": str(tmp_path)}, str(models): {"bind": "/models", "mode": "ro"}},
            tmpfs={"/tmp": "mode=1777"},  # noqa: S108 - inside the container
            network_mode="none",
            stderr=True,
            remove=True,
            **HARDENED,
        )
        ended = instance.get_run_by_id(run_id)
        assert ended is not None
        assert ended.status == DagsterRunStatus.SUCCESS, output.decode()
