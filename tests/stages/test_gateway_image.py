"""The gateway's image as a cluster runs it: built and named by the commands, started as the bundle says, hardened."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import httpx
import load_evidence
import pytest
import yaml
from docker.models.containers import Container
from image_record import image_record
from release_folder import FILES, make_release

import upstreams
from containers.engine.owner import ownership
from containers.gateway import keys
from containers.sandbox import isolation
from evals.load.requests import format_requests
from gateways import TOKENIZER
from homes import Slipway, make_home
from pipeline.settings import Settings
from registry.promote import promote
from registry.signing import load_or_create_key
from stages.loopback_registry import serving
from stages.test_gateway import wait_until

NAME, MODEL = "demo-awq", "demo"
# The bundle's securityContext, and the same in the engine's words.
SECURITY = {"readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
HARDENED: dict[str, Any] = {"read_only": True, "security_opt": ["no-new-privileges"], "cap_drop": ["ALL"]}


@pytest.fixture
def slipway(machine: Settings, tmp_path: Path) -> Slipway:
    """A home whose registry has a release that was load-tested."""
    slipway = Slipway(make_home(tmp_path / "home", machine))
    settings = Settings.read(dict(slipway.variables))
    key = load_or_create_key(settings.signing_key)
    files = {
        **FILES,
        "config.json": (TOKENIZER / "config.json").read_bytes(),
        "release/evidence/load.json": load_evidence.measured().format().encode(),
        "release/evidence/image.json": image_record().model_dump_json().encode(),
        "release/evidence/requests.jsonl": format_requests(load_evidence.requests()).encode(),
    }
    make_release(tmp_path / "release", key, files=files)
    promote(tmp_path / "release", settings.tracking_uri, [key.public])
    return slipway


def only(path: Path, kind: str) -> dict[str, Any]:
    """The one object of a kind in a file of the bundle."""
    (found,) = [each for each in yaml.safe_load_all(path.read_text()) if each["kind"] == kind]
    return dict(found)


@dataclass(frozen=True)
class Pod:
    """The gateway's pod of a bundle: starts its containers, with ``volumes`` by name, on an internal network."""

    engine: docker.DockerClient
    image: str
    spec: dict[str, Any]
    volumes: dict[str, Path]
    network: str
    started: contextlib.ExitStack

    def start(self, which: str) -> Container:
        """Start the pod's container of this name as the bundle has it."""
        (spec,) = [each for each in self.spec["containers"] if each["name"] == which]
        assert spec["securityContext"] == SECURITY
        places = {mount["mountPath"]: self.volumes.get(mount["name"]) for mount in spec["volumeMounts"]}
        return self.run(
            self.image,
            entrypoint=spec.get("command"),
            command=spec["args"],
            volumes={str(folder): {"bind": place} for place, folder in places.items() if folder},
            tmpfs={place: "" for place, folder in places.items() if not folder},
            **HARDENED,
        )

    def run(self, image: str, alias: str | None = None, **options: Any) -> Container:  # noqa: ANN401 - the engine's
        """Start a container on the network, where it is also called ``alias``."""
        container = self.engine.containers.create(image, **options)
        self.started.callback(container.remove, force=True, v=True)
        self.engine.networks.get("bridge").disconnect(container)
        self.engine.networks.get(self.network).connect(container, aliases=[alias] if alias else None)
        container.start()
        container.reload()
        return container


@pytest.fixture
def pod(slipway: Slipway, engine: docker.DockerClient, tmp_path: Path) -> Iterator[Pod]:
    """The pod of the release's bundle, which was told nothing about the gateway's image; a key in its secret."""
    folder = tmp_path / "bundle"
    with serving(tmp_path / "registry") as address:
        done = slipway("image", "gateway", "--json", SLIPWAY_IMAGE_REGISTRY=f"{address}/slipway")
    assert done.returncode == 0, done.stderr
    built = json.loads(done.stdout)
    done = slipway("bundle", NAME, "--out", folder, "--json")
    assert done.returncode == 0, done.stderr
    assert "gateway" not in str(json.loads(done.stdout)["warnings"])
    images = only(folder / "base" / "kustomization.yaml", "Kustomization")["images"]
    assert f"{images[0]['newName']}@{images[0]['digest']}" == built["reference"]
    # Limits in Redis are test_gateway_limits'.
    path = folder / "base" / "gateway.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "redis": None, "drain_delay_s": 2}))
    volumes = {name: tmp_path / name for name in ("keys", "routes")}
    for each in volumes.values():
        each.mkdir()
        each.chmod(0o777)
    # What the pod's init container copies.
    (volumes["routes"] / "routes.json").write_bytes((folder / "base" / "routes.json").read_bytes())
    volumes |= {"config": folder / "base", "tokenizer": TOKENIZER}
    spec = only(folder / "base" / "gateway.yaml", "Deployment")["spec"]["template"]["spec"]
    with isolation.network(engine, f"slipway-test-{uuid.uuid4().hex[:8]}", ownership(slipway.home)) as network:
        assert network is not None
        with contextlib.ExitStack() as started:
            yield Pod(engine, built["image_id"], spec, volumes, network, started)


def replica(pod: Pod) -> None:
    """The stand-in for a replica, in the one image at hand that has what it needs, under its Service's name."""
    pod.run(
        pod.image,
        alias=f"{NAME}-engine",
        entrypoint=["python", "/upstreams.py", "--host", "0.0.0.0", "--port", "8000", "--token-ms", "300"],  # noqa: S104 - its own network
        volumes={upstreams.__file__: {"bind": "/upstreams.py", "mode": "ro"}},
    )


def test_a_bundles_gateway_answers_and_drains_hardened_in_the_image_that_one_command_builds(pod: Pod) -> None:
    _, key = keys.add(pod.volumes["keys"] / "keys.json", "test")
    (pod.volumes["keys"] / "keys.json").chmod(0o644)
    (probed,) = [each for each in pod.spec["containers"] if each["name"] == "gateway"]
    ready, alive = (probed[f"{kind}Probe"]["httpGet"]["path"] for kind in ("readiness", "liveness"))
    container = pod.start("gateway")
    config = container.attrs["Config"]
    assert config["User"] == "65534:65534"
    address = container.attrs["NetworkSettings"]["Networks"][pod.network]["IPAddress"]
    with (
        httpx.Client(base_url=f"http://{address}:8080", timeout=30, trust_env=False) as public,
        httpx.Client(base_url=f"http://{address}:9090", timeout=30, trust_env=False) as admin,
    ):

        def status(path: str) -> int:
            with contextlib.suppress(httpx.TransportError):
                return admin.get(path).status_code
            return 0

        wait_until(lambda: status(alive) == 200)
        assert status(ready) == 503, "it has no replica yet"
        replica(pod)
        pod.start("discover")
        wait_until(lambda: status(ready) == 200)
        assert container.exec_run(config["Healthcheck"]["Test"][1:]).exit_code == 0

        body = {"model": MODEL, "prompt": "def", "max_tokens": 1}
        assert public.post("/v1/completions", json=body).status_code == 401
        public.headers["Authorization"] = f"Bearer {key}"
        answer = public.post("/v1/completions", json=body)
        assert (answer.status_code, answer.headers["x-slipway-release"]) == (200, f"{NAME}@v1")
        assert re.search(rf'_requests_total{{.*key="{key.split("-")[1]}".*}} 1.0', admin.get("/metrics").text)

        with public.stream("POST", "/v1/completions", json={**body, "max_tokens": 8, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            stopping = threading.Thread(target=container.stop, kwargs={"timeout": 20})
            stopping.start()
            wait_until(lambda: status(ready) == 503)
            assert list(filter(None, lines))[-1] == "data: [DONE]"
        stopping.join()
        assert container.wait()["StatusCode"] == 0
