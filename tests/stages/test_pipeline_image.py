"""The pipeline's image as `examples/cluster` runs it: hardened, without a network, beside an engine's socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import docker
import pytest
import yaml
from docker.models.containers import Container

from checkout import CHECKOUT
from containers.engine import private_engine
from containers.engine.engine import DEFAULT_SOCKET
from homes import Slipway, make_home
from pipeline.settings import Settings
from stages.test_gateway import wait_until

pytestmark = pytest.mark.long

VALUES: dict[str, Any] = yaml.safe_load((CHECKOUT / "examples/cluster/values.yaml").read_text())
(DEPLOYMENT,) = VALUES["dagster-user-deployments"]["deployments"]
(CONFIG,) = [
    each["data"]
    for each in yaml.safe_load_all((CHECKOUT / "examples/cluster/objects.yaml").read_text())
    if (each["kind"], each["metadata"]["name"]) == ("ConfigMap", "slipway")
]
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
