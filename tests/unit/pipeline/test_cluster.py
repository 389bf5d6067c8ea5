"""`examples/cluster`: the values of Dagster's chart and the objects beside it, as Dagster and Kubernetes read them.

The chart itself is not here. `written` is what its templates make of the values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kubernetes
import kubernetes_validate
import pytest
import yaml
from dagster import AssetKey, DagsterInstance
from dagster._core.code_pointer import ModuleCodePointer
from dagster._core.launcher import LaunchRunContext, RunLauncher
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
from dagster_k8s import K8sRunLauncher
from helm_python import Chart

from checkout import CHECKOUT
from pipeline.definitions import defs
from pipeline.orchestration.jobs import RELEASE_JOB
from pipeline.settings import Settings
from pipeline.workers.launchers.placement import Kubernetes, placement

Values = dict[str, Any]
VERSIONS = ["1.29", "1.31", "1.33", "1.35", "1.37"]
VALUES: Values = yaml.safe_load((CHECKOUT / "examples/cluster/values.yaml").read_text())
OBJECTS: list[Values] = list(yaml.safe_load_all((CHECKOUT / "examples/cluster/objects.yaml").read_text()))
OWN: Values = yaml.safe_load((CHECKOUT / "dagster.yaml").read_text())
LAUNCHER: Values = VALUES["runLauncher"]["config"]["k8sRunLauncher"]
(DEPLOYMENT,) = VALUES["dagster-user-deployments"]["deployments"]
# What the chart writes into the instance's configuration whatever its values are.
OF_THE_CHART = {"storage", "compute_logs", "telemetry"}


def object_named(kind: str, name: str) -> Values:
    (found,) = [each for each in OBJECTS if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def image_of(place: Values) -> str:
    return f"{place['image']['repository']}:{place['image']['tag']}"


def snake_case(name: str) -> str:
    return re.sub(r"[A-Z]", lambda found: f"_{found[0].lower()}", name)


def test_the_instance_is_configured_as_slipways_own() -> None:
    expected = {key: OWN[key] for key in OWN.keys() - OF_THE_CHART}
    # A node may have to be added before a run's pod starts.
    expected["run_monitoring"] = {**OWN["run_monitoring"], "start_timeout_seconds": 1200}
    assert VALUES["additionalInstanceConfig"] == expected
    assert VALUES["telemetry"] == OWN["telemetry"]
    logs = VALUES["computeLogManager"]
    assert logs == {"type": "CustomComputeLogManager", "config": {"customComputeLogManager": OWN["compute_logs"]}}
    # The chart would write these a second time.
    off = {name: VALUES["dagsterDaemon"][name] for name in ("runCoordinator", "runMonitoring", "runRetries")}
    assert list(off.values()) == [{"enabled": False}] * 3
    assert not {"pythonLogs", "retention", "concurrency"} & VALUES.keys()


def written(folder: Path) -> Values:
    """The `dagster.yaml` that the chart writes, but for PostgreSQL."""
    launcher = {snake_case(key): value for key, value in LAUNCHER.items()}
    for key in ("env_config_maps", "env_secrets"):
        launcher[key] = [each["name"] for each in launcher[key]]
    launcher["run_k8s_config"] = {snake_case(key): value for key, value in launcher["run_k8s_config"].items()}
    config = {
        **launcher,
        "job_namespace": "slipway",
        "service_account_name": "dagster",
        "dagster_home": VALUES["global"]["dagsterHome"],
        "instance_config_map": "dagster-instance",
        "postgres_password_secret": VALUES["global"]["postgresqlSecretName"],
    }
    return {
        **VALUES["additionalInstanceConfig"],
        "compute_logs": VALUES["computeLogManager"]["config"]["customComputeLogManager"],
        "telemetry": VALUES["telemetry"],
        "storage": {"sqlite": {"base_dir": str(folder)}},
        "run_launcher": {"module": "dagster_k8s", "class": VALUES["runLauncher"]["type"], "config": config},
    }


def test_helm_reads_the_same_values(tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "Chart.yaml").write_text("{apiVersion: v2, name: a-chart, version: 1.0.0}")
    (tmp_path / "values.yaml").write_bytes((CHECKOUT / "examples/cluster/values.yaml").read_bytes())
    (tmp_path / "templates/all.yaml").write_text("{{ .Values | toJson }}")
    with Chart.load(tmp_path) as chart:
        (text,) = chart.render({}, name="dagster", namespace="slipway").values()
    assert json.loads(text) == VALUES


@contextmanager
def cluster_instance(folder: Path) -> Iterator[DagsterInstance]:
    """Dagster's instance of that file in a folder, and a cluster that nobody asks."""
    (folder / "dagster.yaml").write_text(yaml.safe_dump(written(folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIPWAY_HOME", str(folder))
        patch.setenv("SLIPWAY_DAGSTER_STORAGE", str(folder))
        patch.setattr(kubernetes.config, "load_incluster_config", lambda **_: None)
        with DagsterInstance.from_config(str(folder)) as opened:
            yield opened


def launched(instance: DagsterInstance, *assets: str, tags: Mapping[str, str]) -> tuple[str, Values]:
    """Launch a run of these assets; return its id, and the Job that it becomes."""
    launcher: RunLauncher[Any] = instance.run_launcher
    sent: list[object] = []
    assert isinstance(launcher, K8sRunLauncher)
    repository = RepositoryPythonOrigin(
        executable_path="/opt/venv/bin/python",
        code_pointer=ModuleCodePointer("pipeline.definitions", "defs"),
        container_image=image_of(DEPLOYMENT),
    )
    run = instance.create_run_for_job(
        defs.resolve_job_def(RELEASE_JOB),
        tags=tags,
        asset_selection=frozenset(map(AssetKey, assets)),
        job_code_origin=JobPythonOrigin(RELEASE_JOB, repository),
    )
    with pytest.MonkeyPatch.context() as patch:
        taken = lambda body, **_: sent.append(body)  # noqa: E731
        patch.setattr(launcher._api_client, "create_namespaced_job_with_retries", taken)
        launcher.launch_run(LaunchRunContext(run, None))
    (body,) = sent
    return run.run_id, dict(kubernetes.client.ApiClient().sanitize_for_serialization(body))


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterInstance]:
    with cluster_instance(tmp_path_factory.mktemp("instance")) as opened:
        yield opened


@pytest.fixture(scope="module")
def job(instance: DagsterInstance) -> Values:
    return launched(instance, "source", tags={})[1]


def test_dagster_reads_the_same_of_it(instance: DagsterInstance) -> None:
    limits = instance.get_concurrency_config()
    assert limits.run_queue_config is not None
    assert limits.run_queue_config.max_concurrent_runs == OWN["concurrency"]["runs"]["max_concurrent_runs"]
    assert limits.pool_config.default_pool_limit == OWN["concurrency"]["pools"]["default_limit"]
    assert (instance.run_monitoring_enabled, instance.run_retries_enabled) == (True, True)
    assert instance.run_launcher.supports_check_run_worker_health


@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_becomes_a_job_that_kubernetes_takes(job: Values, version: str) -> None:
    kubernetes_validate.validate(job, version, strict=True)


def test_a_run_is_unprivileged_and_has_an_engine_of_its_own(job: Values) -> None:
    pod = job["spec"]["template"]["spec"]
    (run,), (engine,) = pod["containers"], pod["initContainers"]
    assert run["image"] == image_of(DEPLOYMENT)
    assert run["args"][:5] == ["/opt/venv/bin/python", "-m", "dagster", "api", "execute_run"]
    assert {"name": "DAGSTER_HOME", "value": VALUES["global"]["dagsterHome"]} in run["env"]
    assert run["securityContext"] == DEPLOYMENT["securityContext"]
    assert pod["securityContext"] == DEPLOYMENT["podSecurityContext"]
    assert {"configMapRef": {"name": "slipway"}} in run["envFrom"]
    assert {"secretRef": {"name": "slipway"}} in run["envFrom"]
    # The engine listens where Slipway looks, ends with the run, and finds the home's folders under their own paths.
    assert f"--host={object_named('ConfigMap', 'slipway')['data']['DOCKER_HOST']}" in engine["args"]
    assert engine["restartPolicy"] == "Always"
    shared = {mount["name"]: mount["mountPath"] for mount in engine["volumeMounts"]}
    places = {mount["name"]: mount["mountPath"] for mount in run["volumeMounts"]}
    assert [shared[name] for name in ("home", "engine")] == [places[name] for name in ("home", "engine")]


@pytest.mark.parametrize("given", [DEPLOYMENT, LAUNCHER], ids=["code location", "run"])
def test_a_pod_of_slipway_has_its_settings_their_folders_and_an_engine(given: Values) -> None:
    assert (given["envConfigMaps"], given["envSecrets"]) == ([{"name": "slipway"}], [{"name": "slipway"}])
    variables = object_named("ConfigMap", "slipway")["data"]
    socket = variables["DOCKER_HOST"].removeprefix("unix://")
    paths = [Path(value) for value in (*variables.values(), socket) if value.startswith("/")]
    assert len(paths) == 5
    mounted = {Path(mount["mountPath"]): mount["name"] for mount in given["volumeMounts"]}
    for path in paths:
        assert any(path.is_relative_to(folder) for folder in mounted), path
    pod = given if given is DEPLOYMENT else given["runK8sConfig"]["podSpecConfig"]
    (engine,) = pod["initContainers"]
    assert f"--host={variables['DOCKER_HOST']}" in engine["args"]
    places = {mount["name"]: Path(mount["mountPath"]) for mount in engine["volumeMounts"]}
    assert mounted[places["engine"]] == "engine"
    assert Path(socket).is_relative_to(places["engine"])


def test_the_images_of_all_pods_are_the_one_that_the_workers_have() -> None:
    workers = yaml.safe_load(object_named("ConfigMap", "slipway-workers")["data"]["workers.yaml"])
    pods = [DEPLOYMENT, VALUES["dagsterWebserver"], VALUES["dagsterDaemon"]]
    assert {image_of(pod) for pod in pods} == {workers["image"]}


@pytest.mark.parametrize("part", ["dagsterWebserver", "dagsterDaemon", "deployment"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_pod_of_the_charts_is_valid(part: str, version: str) -> None:
    given = DEPLOYMENT if part == "deployment" else VALUES[part]
    sources = [
        *({"configMapRef": each} for each in given["envConfigMaps"]),
        *({"secretRef": each} for each in given["envSecrets"]),
    ]
    container = {
        "name": "dagster",
        "image": image_of(given),
        "imagePullPolicy": given["image"]["pullPolicy"],
        "envFrom": sources,
        "resources": given.get("resources", {}),
        **{key: given[key] for key in ("securityContext", "volumeMounts", "readinessProbe") if key in given},
    }
    pod = {
        "securityContext": given["podSecurityContext"],
        "initContainers": given.get("initContainers", []),
        "containers": [container],
        "volumes": given["volumes"],
    }
    document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
    kubernetes_validate.validate(document, version, strict=True)
    mounted = {mount["name"] for each in (container, *pod["initContainers"]) for mount in each["volumeMounts"]}
    assert mounted <= {volume["name"] for volume in given["volumes"]}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("document", OBJECTS, ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_the_objects_beside_the_chart_are_valid(document: Values, version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def test_the_settings_and_the_workers_file_are_read(tmp_path: Path) -> None:
    variables = dict(object_named("ConfigMap", "slipway")["data"])
    home = next(mount["mountPath"] for mount in LAUNCHER["volumeMounts"] if mount["name"] == "home")
    settings = Settings.read({**variables, "SLIPWAY_HOME": home})
    assert settings.home / "dagster" == Path(variables["SLIPWAY_DAGSTER_STORAGE"])
    assert settings.workers == Path("/etc/slipway/workers.yaml")
    file = tmp_path / "workers.yaml"
    file.write_text(object_named("ConfigMap", "slipway-workers")["data"]["workers.yaml"])
    workers = placement(file)
    assert isinstance(workers, Kubernetes)
    assert workers.image == image_of(DEPLOYMENT)
    for volume in LAUNCHER["volumes"]:
        for kind, key in (("PersistentVolumeClaim", "persistentVolumeClaim"), ("ConfigMap", "configMap")):
            if key in volume:
                assert object_named(kind, volume[key].get("claimName") or volume[key]["name"])
