from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import load_evidence
import pytest
import yaml
from bundle_evidence import (
    DIGEST,
    GATEWAY,
    REDIS,
    cluster,
    evidence,
    files,
    image,
    load_gate,
    manifest,
    measured,
    on_four_gpus,
    on_gpu,
    written,
)
from image_record import image_record
from release_folder import serving

from containers.gateway.config import GatewaySettings, Routes
from containers.kubernetes import discover
from containers.kubernetes.autoscaling import (
    Behaviour,
    Day,
    SimulatedReplica,
    make_day,
    memory_gauge,
    outstanding,
    request_count,
    simulate,
)
from containers.kubernetes.bundle import BundleError, write_bundle
from containers.kubernetes.cluster import Cluster
from containers.kubernetes.names import object_name
from containers.kubernetes.numbers import AnsweredRequest, numbers
from pipeline.serving.deployment import measurements

# Objects of operators, whose schemas are no part of Kubernetes.
OPERATORS = {"ServiceMonitor", "PrometheusRule"}
KUSTOMIZE = {"Kustomization", "Component"}


@pytest.fixture(params=["cpu", "gpu", "cpu-own", "gpu-own"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The bundle of a release on CPU or GPU, for any cluster and for one with everything of its own."""
    device, _, own = request.param.partition("-")
    written(evidence() if device == "cpu" else on_gpu(), tmp_path / "bundle", cluster() if own else None)
    return tmp_path / "bundle"


def start_seconds() -> float:
    """What a start took in the load test."""
    return measured().start_seconds or 0.0


def objects(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            yield path, document


def one(folder: Path, kind: str, name: str) -> dict[str, Any]:
    found = [each for _, each in objects(folder) if each.get("kind") == kind and each["metadata"]["name"] == name]
    return found[0]


# The files


def test_every_object_is_what_kubernetes_has_published(folder: Path) -> None:
    kinds = set()
    for path, document in objects(folder):
        kind = document.get("kind")
        if kind in OPERATORS | KUSTOMIZE or kind is None or path.parent.name == "weights":
            continue
        kubernetes_validate.validate(document, "1.37", strict=True)
        kinds.add(kind)
    assert kinds == {
        "Namespace", "ServiceAccount", "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "ConfigMap",
        "HorizontalPodAutoscaler",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("demo-awq", "demo-awq"),
        ("llama-3.1-8b-instruct-awq", "llama-3-1-8b-instruct-awq"),
        ("Qwen3_5-Text-gptq", "qwen3-5-text-gptq"),
        ("7b-awq", "r-7b-awq"),
        ("a" * 53, "a" * 53),
        ("a" * 54, "a" * 46 + "-a3f01b"),
    ],
)
def test_a_lines_objects_have_names_that_kubernetes_takes(line: str, name: str) -> None:
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert (object_name(line), len(f"{name}-tokenizer") <= 63) == (name, True)


def test_lines_whose_names_are_cut_stay_apart() -> None:
    assert object_name("a" * 100 + ".1") != object_name("a" * 100 + ".2")


@pytest.mark.parametrize("model", ["llama-3.1-8b-instruct", "m" * 110])
def test_every_name_in_a_bundle_is_valid_whatever_the_model_is_called(tmp_path: Path, model: str) -> None:
    written(evidence(manifest=manifest(model=model)), tmp_path / "bundle")
    services = 0
    for path, document in objects(tmp_path / "bundle"):
        if document.get("kind") in KUSTOMIZE or "metadata" not in document:
            continue
        name = document["metadata"]["name"]
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name), f"{path.name}: {name}"
        for value in document["metadata"].get("labels", {}).values():
            assert len(value) <= 63
        services += document["kind"] == "Service"
    assert services == 3
    routed = json.loads((tmp_path / "bundle/base/routes.json").read_text())["models"][model]
    assert routed["backends"][0]["release"] == f"{model}-awq@v3"


def test_a_release_line_is_removed_without_the_namespace_and_other_lines(folder: Path) -> None:
    assert [path.parent for path, each in objects(folder) if each.get("kind") == "Namespace"] == [folder]
    text = (folder / "README.md").read_text()
    steps = [text.index(step) for step in ("kubectl apply -f namespace.yaml", "create secret", "kubectl apply -k")]
    assert steps == sorted(steps)


def amounts(value: object, key: str = "") -> Iterator[str]:
    """Every amount in a manifest."""
    if isinstance(value, dict):
        for name, inner in value.items():
            under = key if key in {"requests", "limits"} else name
            yield from amounts(inner, under)
    elif isinstance(value, list):
        for inner in value:
            yield from amounts(inner)
    elif key in {"requests", "limits", "sizeLimit", "averageValue"}:
        assert isinstance(value, str), f"{key}: {value!r} is no text"
        yield value


def test_applying_it_twice_changes_nothing(folder: Path) -> None:
    """What Kubernetes writes in another way than it was given is a difference at each `kubectl diff`."""
    for path, document in objects(folder):
        if document.get("kind") in {*KUSTOMIZE, None}:
            continue
        for amount in amounts(document):
            number, suffix = re.fullmatch(r"(\d+)(m|Mi|Gi|)", amount).groups()  # type: ignore[union-attr]
            assert not (suffix and int(number) % (1000 if suffix == "m" else 1024) == 0), f"{path.name}: {amount}"
        if document.get("kind") == "Deployment" and path.parent.name != "weights":  # which are patches
            assert document["spec"]["strategy"]["type"]
        assert "[]" not in json.dumps(document), path.name


def test_a_release_on_cpu_has_no_gpu(tmp_path: Path) -> None:
    assert numbers(evidence())["gpus"].value == 0
    assert numbers(on_gpu())["gpus"].value == 1


def test_a_replica_of_several_gpus_asks_for_all_of_them_and_more_shared_memory(tmp_path: Path) -> None:
    four = on_four_gpus()
    written(four, tmp_path / "four")
    pod = one(tmp_path / "four", "Deployment", "demo-awq-engine")["spec"]["template"]["spec"]
    (engine,) = pod["containers"]
    assert engine["resources"]["requests"]["nvidia.com/gpu"] == engine["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert next(volume for volume in pod["volumes"] if volume["name"] == "shm")["emptyDir"]["sizeLimit"] == "4Gi"
    assert [variable["name"] for variable in engine["env"]] == ["HOME"]
    assert "s of a start of 4 ranks" in numbers(four)["start_failures"].why


def test_the_ranks_of_a_cpu_server_divide_its_threads(tmp_path: Path) -> None:
    written(evidence(measured=measured(ranks=2, cores=5.0, shared_memory_bytes=2 * 2**30)), tmp_path / "two")
    pod = one(tmp_path / "two", "Deployment", "demo-awq-engine")["spec"]["template"]["spec"]
    variables = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}
    assert variables == {"HOME": "/tmp", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2"}  # noqa: S108


def test_the_grace_period_is_that_of_a_real_load_test() -> None:
    """By the name that ``load.json`` has for the time of a token, in the evidence of a release."""
    found = numbers(evidence())["grace_seconds"]
    p99 = load_evidence.measured().metrics["p99_tpot_ms"]
    assert found.value == math.ceil(1024 * p99 / 1000) + 10
    assert f"1024 tokens at {p99:.2f} ms (load.json: p99_tpot_ms)" in found.why


def test_the_grace_period_of_an_early_release_is_taken_from_the_former_name_of_the_metric() -> None:
    early = load_evidence.changed(load_evidence.measured(), {"metrics": {"p99_inter_token_ms": 48.0}})
    found = numbers(evidence(measured=measurements(early, load_evidence.requests())))
    assert found["grace_seconds"].value == math.ceil(1024 * 0.048) + 10


def test_the_grace_period_is_taken_from_the_requests_where_the_metric_is_missing() -> None:
    slow = measured(metrics={**measured().metrics, "p99_tpot_ms": 48.0})
    assert numbers(evidence(measured=slow))["grace_seconds"].value == math.ceil(1024 * 0.048) + 10
    assert numbers(evidence(measured=slow))["request_timeout"].value == math.ceil(1024 * 0.048) + 10
    without = measured(metrics={"peak_memory_bytes": 1.0}, requests=[AnsweredRequest(1600.0, 32)])
    found = numbers(evidence(measured=without))["grace_seconds"]
    assert (found.value, "requests.jsonl" in found.why) == (math.ceil(1024 * 0.05) + 10, True)


def test_a_mistake_would_be_found(folder: Path) -> None:
    broken = one(folder, "Deployment", "demo-awq-engine")
    broken["spec"]["template"]["spec"]["terminationGracePeriod"] = 5
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.37", strict=True)


def test_what_kustomize_is_pointed_at_is_there_and_nothing_is_forgotten(folder: Path) -> None:
    named: set[Path] = set()
    for path, document in objects(folder):
        if document.get("kind") not in KUSTOMIZE:
            continue
        for entry in [*document.get("resources", ()), *document.get("components", ())]:
            assert (path.parent / entry).exists()
            named.add((path.parent / entry).resolve())
        for generator in document.get("configMapGenerator", ()):
            named |= {(path.parent / entry).resolve() for entry in generator["files"]}
        for patch in document.get("patches", ()):
            named |= {(path.parent / patch["path"]).resolve()} if "path" in patch else set()
    assert all(path.exists() for path in named)
    left = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.resolve() not in named and path.name != "kustomization.yaml"
    }
    rules = {"monitoring/rules.yaml", "monitoring/rules_test.yaml"}
    assert left == {"README.md", "namespace.yaml", "adapter.yaml", *rules}


def kustomized(place: Path) -> list[dict[str, Any]]:
    """What kustomize makes of a folder; the test is skipped where there is none (the tests around it need none)."""
    tool = shutil.which("kubectl")
    if tool is None:
        pytest.skip("kubectl is not installed: nothing here has built the bundle with kustomize")
    done = subprocess.run([tool, "kustomize", str(place)], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def test_weights_that_are_not_in_the_image_are_pulled_and_verified_first(folder: Path) -> None:
    patch = yaml.safe_load((folder / "weights" / "pull.yaml").read_text())["spec"]["template"]["spec"]
    (container,) = patch["initContainers"]
    assert container["args"][:2] == ["pull", "demo-awq@v3"]
    # They are where the image would have them, which is where the engine and the gateway's tokenizer look.
    at_model = {"name": "weights", "mountPath": "/model", "subPath": "model", "readOnly": True}
    assert container["args"][2] == "/weights/model"
    (engine,) = patch["containers"]
    trusted = {"name": "trust", "mountPath": "/etc/slipway-trust", "readOnly": True}
    marks = {"name": "marks", "mountPath": "/var/lib/slipway-loader"}
    assert (engine["name"], engine["volumeMounts"]) == ("engine", [at_model, trusted, marks])
    # The loader verifies them again, and accepts this release alone.
    deployed = one(folder, "Deployment", "demo-awq-engine")["metadata"]["annotations"]
    assert engine["env"] == [{"name": "SLIPWAY_MANIFEST", "value": deployed["slipway/manifest"]}]
    beside = yaml.safe_load((folder / "weights" / "tokenizer.yaml").read_text())["spec"]["template"]["spec"]
    assert beside["initContainers"] == [container, {"name": "tokenizer", "volumeMounts": [at_model]}]
    policy = one(folder, "NetworkPolicy", "demo-awq-pull")
    kubernetes_validate.validate(policy, "1.37", strict=True)
    assert {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]} - {5353} == {53, 443}


def test_a_variant_runs_with_its_arguments_and_a_release_without_it_is_not_pulled(tmp_path: Path) -> None:
    short = serving("short", ["--model", "/model", "--max-model-len", "512"])
    written(evidence(variant=short), tmp_path / "bundle")
    engine = one(tmp_path / "bundle", "Deployment", "demo-awq-engine")
    (container,) = engine["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["--model", "/model", "--max-model-len", "512"]
    assert engine["metadata"]["annotations"]["slipway/variant"] == "short"
    kubernetes_validate.validate(engine, "1.37", strict=True)
    for name in ("pull", "tokenizer"):
        patch = yaml.safe_load((tmp_path / f"bundle/weights/{name}.yaml").read_text())
        first, *_ = patch["spec"]["template"]["spec"]["initContainers"]
        assert first["args"][-2:] == ["--variant", "short"]


def test_adapters_are_routed_and_mounted_where_the_image_has_them(tmp_path: Path) -> None:
    record = {"sha256": "ab" * 32, "size": 600}
    adapter = {"uri": "file:tests", "revision": "0" * 40, "rank": 4, "modules": ["q_proj"]}
    adapter |= {"files": {"a.safetensors": record}}
    released = manifest(adapters={"tests": adapter}, files={**files(3_800_000), "adapters/tests/a.safetensors": record})
    written(evidence(manifest=released), tmp_path / "b")
    assert json.loads((tmp_path / "b/base/routes.json").read_text())["models"]["demo"]["adapters"] == ["tests"]
    patch = yaml.safe_load((tmp_path / "b/weights/pull.yaml").read_text())["spec"]["template"]["spec"]
    (engine,) = patch["containers"]
    assert engine["volumeMounts"][1] == {
        "name": "weights", "mountPath": "/adapters", "subPath": "model/adapters", "readOnly": True,
    }  # fmt: skip


def test_a_draft_model_is_mounted_where_the_image_has_it(tmp_path: Path) -> None:
    record = {"sha256": "ab" * 32, "size": 600}
    drafting = {"uri": "file:draft", "revision": "0" * 40, "files": {"a.safetensors": record}}
    released = manifest(draft_model=drafting, files={**files(3_800_000), "draft_model/a.safetensors": record})
    written(evidence(manifest=released), tmp_path / "b")
    patch = yaml.safe_load((tmp_path / "b/weights/pull.yaml").read_text())["spec"]["template"]["spec"]
    (engine,) = patch["containers"]
    assert engine["volumeMounts"][1:-2] == [
        {"name": "weights", "mountPath": "/draft_model", "subPath": "model/draft_model", "readOnly": True}
    ]


def test_kustomize_puts_the_pull_before_all_else(folder: Path) -> None:
    overlay = folder / "overlays" / "pulled"
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [../../base]\n"
        "components: [../../weights]\n"
    )
    built = kustomized(overlay)
    pods = {}
    for document in built:
        kubernetes_validate.validate(document, "1.37", strict=True)
        if document["kind"] == "Deployment":
            pods[document["metadata"]["name"]] = document["spec"]["template"]["spec"]
    assert any(document["metadata"]["name"] == "demo-awq-pull" for document in built)
    engine, gateway = pods["demo-awq-engine"], pods["demo-awq-gateway"]
    assert [each["name"] for each in engine["initContainers"]] == ["pull"]
    assert {"tmp", "shm", "weights", "trust"} <= {volume["name"] for volume in engine["volumes"]}
    assert engine["containers"][0]["image"] == f"registry.example/demo@{DIGEST}"
    assert [each["name"] for each in gateway["initContainers"]] == ["pull", "tokenizer"]
    mounts = {mount["mountPath"] for mount in gateway["initContainers"][1]["volumeMounts"]}
    assert {"/model", "/srv/tokenizer", "/etc/slipway", "/run/slipway"} <= mounts


@pytest.mark.parametrize("overlay", ["production", "small"])
def test_kustomize_builds_it_where_kustomize_is(folder: Path, overlay: str) -> None:
    built = kustomized(folder / "overlays" / overlay)
    for document in built:
        if document["kind"] not in OPERATORS:
            kubernetes_validate.validate(document, "1.37", strict=True)
    engine = next(each for each in built if each["kind"] == "Deployment" and "engine" in each["metadata"]["name"])
    assert engine["spec"].get("replicas") == (None if overlay == "production" else 1)
    gateway = next(each for each in built if each["kind"] == "Deployment" and "gateway" in each["metadata"]["name"])
    images = {container["image"] for container in gateway["spec"]["template"]["spec"]["containers"]}
    assert images == {GATEWAY}


def test_argo_cd_starts_the_gateway_after_the_engine(folder: Path) -> None:
    overlay = folder / "overlays" / "argocd"
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [../../base]\n"
        "components: [../../argocd]\n"
    )
    waves = {
        each["metadata"]["name"]: each["metadata"]["annotations"]["argocd.argoproj.io/sync-wave"]
        for each in kustomized(overlay)
        if each["kind"] == "Deployment"
    }
    assert waves == {"demo-awq-redis": "-1", "demo-awq-engine": "0", "demo-awq-gateway": "1"}


def test_every_number_says_where_it_comes_from(folder: Path) -> None:
    number = re.compile(r'[:,\[ ]\s*"?-?\d+(\.\d+)?(m|s|Mi|Gi)?"?\s*([,}\]].*)?$')
    bare = []
    for path in [*folder.rglob("*.yaml")]:
        if path.name == "rules_test.yaml":
            continue
        for line in path.read_text().splitlines():
            if line.lstrip().startswith("#"):
                continue
            code, mark, said = line.partition(" # ")
            if number.search(code) and "apiVersion" not in code and "expr:" not in code and not (mark and said.strip()):
                bare.append(f"{path.name}: {line.strip()}")
    assert bare == []


def test_the_image_is_run_by_digest_hardened_as_it_was_tested(folder: Path) -> None:
    pod = one(folder, "Deployment", "demo-awq-engine")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == f"registry.example/demo@{DIGEST}"
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert pod["securityContext"]["runAsUser"] == 65534
    assert pod["automountServiceAccountToken"] is False
    assert (
        container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"]
        >= 3 * start_seconds()
    )


def test_a_gpu_is_asked_for_with_its_driver(tmp_path: Path) -> None:
    written(on_gpu(), tmp_path / "b")
    pod = one(tmp_path / "b", "Deployment", "demo-awq-engine")["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]

    def allows(major: int, minor: int) -> bool:
        have = {"major": major, "minor": minor}

        def holds(rule: dict[str, Any]) -> bool:
            value = have[rule["key"].rpartition(".")[2]]
            return value > int(rule["values"][0]) if rule["operator"] == "Gt" else str(value) in rule["values"]

        return any(all(holds(rule) for rule in term["matchExpressions"]) for term in terms)

    assert allows(580, 65)
    assert allows(590, 1)
    assert not allows(580, 64)
    assert not allows(575, 99)


def test_a_node_that_is_known_to_lack_avx2_gets_no_engine_on_cpu(tmp_path: Path) -> None:
    written(evidence(), tmp_path / "b")
    pod = one(tmp_path / "b", "Deployment", "demo-awq-engine")["spec"]["template"]["spec"]
    terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    nfd = "feature.node.kubernetes.io"
    vendor, avx2 = {f"{nfd}/cpu-model.vendor_id": "AMD"}, {f"{nfd}/cpu-cpuid.AVX2": "true"}
    amd64, arm64 = {"kubernetes.io/arch": "amd64"}, {"kubernetes.io/arch": "arm64"}
    nodes = [amd64 | vendor | avx2, amd64 | vendor, amd64, arm64, arm64 | vendor | avx2]
    assert [any(fits(term, labels) for term in terms) for labels in nodes] == [True, False, True, False, False]


def fits(term: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a node's labels are what a term asks for, as Kubernetes' scheduler has it."""
    asked = {
        "In": lambda each: labels.get(each["key"]) in each["values"],
        "DoesNotExist": lambda each: each["key"] not in labels,
    }
    return all(asked[each["operator"]](each) for each in term["matchExpressions"])


def test_nobody_but_the_gateway_and_prometheus_reaches_the_engine(folder: Path) -> None:
    policy = one(folder, "NetworkPolicy", "demo-awq-engine")["spec"]
    senders = policy["ingress"][0]["from"]
    assert [next(iter(sender)) for sender in senders] == ["podSelector", "namespaceSelector"]
    assert "egress" not in policy
    assert "Egress" in policy["policyTypes"]
    (selected,) = one(folder, "NetworkPolicy", "demo-awq-nothing")["spec"]["podSelector"]["matchExpressions"]
    assert selected["values"] == ["demo-awq-engine", "demo-awq-gateway", "demo-awq-redis"], "and nobody else's pods"


def test_the_gpus_memory_is_scaled_on_only_where_there_is_one_and_its_flatness_is_said(tmp_path: Path) -> None:
    written(evidence(), tmp_path / "cpu")
    written(on_gpu(), tmp_path / "gpu")

    def metrics(kind: str) -> list[str]:
        hpa = one(tmp_path / kind, "HorizontalPodAutoscaler", "demo-awq-engine")
        return [metric["pods"]["metric"]["name"] for metric in hpa["spec"]["metrics"]]

    assert set(metrics("gpu")) - set(metrics("cpu")) == {"slipway_gpu_memory_used"}
    hpa = (tmp_path / "gpu" / "autoscaling" / "hpa.yaml").read_text()
    assert "this gauge is the same for an idle and an overloaded server" in hpa


def test_a_metric_of_the_autoscaler_is_one_that_the_rules_record(folder: Path) -> None:
    hpa = one(folder, "HorizontalPodAutoscaler", "demo-awq-engine")
    rules = yaml.safe_load((folder / "monitoring" / "rules.yaml").read_text())["groups"][0]["rules"]
    recorded = {rule["record"].replace("slipway:", "slipway_") for rule in rules}
    assert {metric["pods"]["metric"]["name"] for metric in hpa["spec"]["metrics"]} <= recorded
    operator = one(folder, "PrometheusRule", "demo-awq")["spec"]
    assert operator == yaml.safe_load((folder / "monitoring" / "rules.yaml").read_text())


def test_the_dashboard_is_json_with_the_limits_and_their_evidence(folder: Path) -> None:
    panels = json.loads((folder / "monitoring" / "dashboard.json").read_text())["panels"]
    latency = next(panel for panel in panels if panel["title"] == "Latency")
    assert latency["fieldConfig"]["defaults"]["thresholds"]["steps"][1]["value"] == 2.0
    assert "gates.load.limits" in latency["description"]


def test_the_place_is_taken_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(BundleError, match="not empty"):
        written(evidence(), tmp_path / "full")
    broken = evidence(measured=measured(start_seconds=None))
    with pytest.raises(BundleError, match="release again"):
        written(broken, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_what_is_missing_before_it_can_be_applied_is_said(tmp_path: Path) -> None:
    made = write_bundle(evidence(manifest=manifest(image=image(reference=DIGEST))), image_record(), tmp_path / "b")
    assert [warning.split(":")[0] for warning in made.warnings] == [
        "the release's image was not pushed",
        "the load test did not measure the capacity (`load.capacity`)",
        "the gateway's image is unknown",
    ]
    assert written(on_gpu(), tmp_path / "c").warnings == ()


def test_the_gateway_takes_its_settings_and_its_routes(folder: Path) -> None:
    read = GatewaySettings.model_validate_json((folder / "base" / "gateway.json").read_bytes())
    assert read.redis == "redis://demo-awq-redis:6379/0"
    assert read.drain_timeout_s >= 13
    template = json.loads((folder / "base" / "routes.json").read_text())
    routes = Routes.model_validate(discover.routes(template, ["10.0.0.1"], 8000))
    (backend,) = routes.models["demo"].backends
    assert (backend.release, backend.replicas[0].url) == ("demo-awq@v3", "http://10.0.0.1:8000")
    (pod,) = [one(folder, "Deployment", "demo-awq-gateway")["spec"]["template"]["spec"]]
    mounts = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    for path in (read.keys, read.routes, routes.models["demo"].tokenizer):
        assert any(str(path).startswith(mount) for mount in mounts), path


def test_the_gateway_gets_all_that_prompts_are_counted_with(folder: Path, tmp_path: Path) -> None:
    pod = one(folder, "Deployment", "demo-awq-gateway")["spec"]["template"]["spec"]
    (container,) = pod["initContainers"]
    files = {
        "/model": ["config.json", "tokenizer.json", "special.json", "chat_template.jinja", "model.safetensors"],
        "/etc/slipway": ["routes.json"], "/srv/tokenizer": [], "/run/slipway": [],
    }  # fmt: skip
    command = container["command"]
    for place, names in files.items():
        (tmp_path / place.strip("/")).mkdir(parents=True)
        for name in names:
            (tmp_path / place.strip("/") / name).touch()
        command = [word.replace(place, f"{tmp_path}{place}") for word in command]
    for left in ("chat_template.jinja", "none"):
        subprocess.run(command, check=True)
        assert (tmp_path / "run/slipway/routes.json").exists()
        copied = {path.name for path in (tmp_path / "srv/tokenizer").iterdir()}
        assert copied == set(files["/model"]) - {"model.safetensors"}
        (tmp_path / "model" / left).unlink(missing_ok=True)  # a release without one is as well


# The cluster's own


def pods(folder: Path) -> dict[str, dict[str, Any]]:
    found = (each for _, each in objects(folder / "base") if each.get("kind") == "Deployment")
    return {each["metadata"]["name"].rpartition("-")[2]: each["spec"]["template"]["spec"] for each in found}


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", ()), *pod["containers"]]


def test_a_cluster_that_nothing_is_said_of_is_asked_for_nothing_of_its_own(tmp_path: Path) -> None:
    written(on_gpu(), tmp_path / "b")
    found = pods(tmp_path / "b")
    assert set(found) == {"engine", "gateway", "redis"}
    for pod in found.values():
        assert not {"imagePullSecrets", "priorityClassName", "runtimeClassName"} & set(pod)
        for container in containers(pod):
            assert not {"cpu", "ephemeral-storage"} & set(container["resources"]["limits"])
            assert "ephemeral-storage" not in container["resources"]["requests"]
    for kind in ("ServiceMonitor", "PrometheusRule"):
        named = [each for _, each in objects(tmp_path / "b") if each.get("kind") == kind]
        assert named
        assert all("labels" not in each["metadata"] for each in named)


def test_every_pod_has_what_is_the_clusters_own(tmp_path: Path) -> None:
    written(on_gpu(), tmp_path / "b", cluster())
    for name, pod in pods(tmp_path / "b").items():
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
        assert pod["priorityClassName"] == "release-critical"
        assert pod.get("runtimeClassName") == ("nvidia" if name == "engine" else None)
        for container in containers(pod):
            assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"]["limits"]), container["name"]
    (engine,) = pods(tmp_path / "b")["engine"]["containers"]
    limits, requests = engine["resources"]["limits"], engine["resources"]["requests"]
    assert (requests["cpu"], limits["cpu"]) == ("1500m", "16")
    assert requests["ephemeral-storage"] == limits["ephemeral-storage"] == "8Gi"
    for kind in ("ServiceMonitor", "PrometheusRule"):
        named = [each for _, each in objects(tmp_path / "b") if each.get("kind") == kind]
        assert {each["metadata"]["labels"]["release"] for each in named} == {"kube-prometheus-stack"}


def test_a_release_on_cpu_names_no_runtime_class_whatever_the_cluster_has(tmp_path: Path) -> None:
    written(evidence(), tmp_path / "b", cluster())
    assert "runtimeClassName" not in pods(tmp_path / "b")["engine"]


def test_a_gpus_runtime_class_is_explained(tmp_path: Path) -> None:
    for name, placed in (("with", cluster()), ("without", None)):
        written(on_gpu(), tmp_path / name, placed)
    assert "describe replicaset" in (tmp_path / "with" / "README.md").read_text()
    assert "kubectl get\nruntimeclass` shows `nvidia`" in (tmp_path / "without" / "README.md").read_text()
    written(evidence(), tmp_path / "cpu")
    assert "RuntimeClass" not in (tmp_path / "cpu" / "README.md").read_text()


def test_half_of_the_tested_cores_are_asked_for_and_why_is_said(tmp_path: Path) -> None:
    given = evidence(measured=measured(cores=3.0))
    found = numbers(given)
    assert (found["cpus"].value, found["cpu_request"].value) == ("3", "1500m")
    written(given, tmp_path / "b")
    (engine,) = pods(tmp_path / "b")["engine"]["containers"]
    assert engine["resources"]["requests"]["cpu"] == "1500m"
    assert f"requests 1500m CPU: {found['cpu_request'].why}" in (tmp_path / "b" / "README.md").read_text()


def test_a_request_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"`cpu_request` is 2\.5, above the limit that `cpu_limits` sets: 2,"):
        written(evidence(), tmp_path / "b", cluster(cpu_request=2.5))
    written(evidence(), tmp_path / "b", cluster(cpu_request=2.5, cpu_limits=False))


@pytest.mark.parametrize(("surge", "expected"), [(True, (1, 0)), (False, (0, 1))])
def test_full_nodes_are_updated_without_a_replica_more(tmp_path: Path, surge: bool, expected: tuple[int, int]) -> None:
    written(evidence(), tmp_path / "b", cluster(surge=surge))
    for name in ("engine", "gateway"):
        rolling = one(tmp_path / "b", "Deployment", f"demo-awq-{name}")["spec"]["strategy"]["rollingUpdate"]
        assert (rolling["maxSurge"], rolling["maxUnavailable"]) == expected


def test_no_volume_grows_without_end_and_no_sick_pod_stops_a_drain(folder: Path) -> None:
    for pod in pods(folder).values():
        volumes = [volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume]
        assert volumes
        assert all("sizeLimit" in volume for volume in volumes)
    budgets = [each["spec"] for _, each in objects(folder) if each.get("kind") == "PodDisruptionBudget"]
    assert [each["unhealthyPodEvictionPolicy"] for each in budgets] == ["AlwaysAllow"] * 2
    (spread,) = pods(folder)["gateway"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == {"app.kubernetes.io/name": "demo-awq-gateway"}


@pytest.mark.parametrize(("size", "seconds"), [(30 * 10**9, 1562), (10**9, 600)])
def test_a_large_image_has_the_time_to_be_pulled(tmp_path: Path, size: int, seconds: int) -> None:
    write_bundle(evidence(), image_record(size_bytes=size), tmp_path / "b")
    assert one(tmp_path / "b", "Deployment", "demo-awq-engine")["spec"]["progressDeadlineSeconds"] == seconds


@pytest.mark.parametrize("where", ["base", "weights"])
def test_names_are_looked_up_where_the_cluster_has_them_answered(tmp_path: Path, where: str) -> None:
    def asked(placed: Cluster | None) -> dict[str, Any]:
        folder = tmp_path / str(placed is None)
        written(evidence(), folder, placed)
        policies = [each["spec"] for _, each in objects(folder / where) if each.get("kind") == "NetworkPolicy"]
        rules = [rule for policy in policies for rule in policy.get("egress", ())]
        (found,) = [rule for rule in rules if {"port": 53, "protocol": "UDP"} in rule["ports"]]
        return dict(found)

    plain, own = asked(None), asked(cluster())
    assert [each["podSelector"]["matchLabels"] for each in plain["to"]] == [{"k8s-app": "kube-dns"}]
    assert own["to"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "openshift-dns"}
    assert [each["ipBlock"]["cidr"] for each in own["to"][1:]] == ["169.254.20.10/32", "fd00::a/128"]
    assert [port["port"] for port in own["ports"]] == [53, 53, 5353, 5353]


def test_no_policy_holds_workers_that_run_as_jobs_in_the_same_namespace(folder: Path) -> None:
    lines = {f"demo-awq-{part}" for part in ("engine", "gateway", "redis")}
    policies = [each["spec"]["podSelector"] for _, each in objects(folder) if each.get("kind") == "NetworkPolicy"]
    assert len(policies) == 5
    for selector in policies:
        if "matchLabels" in selector:
            names = {selector["matchLabels"]["app.kubernetes.io/name"]}
        else:
            (rule,) = selector["matchExpressions"]
            assert (rule["key"], rule["operator"]) == ("app.kubernetes.io/name", "In")
            names = set(rule["values"])
        assert names <= lines


def test_prometheus_adapter_can_mount_its_rules(folder: Path) -> None:
    (adapter,) = yaml.safe_load_all((folder / "adapter.yaml").read_text())
    assert adapter["metadata"] == {"name": "slipway-adapter", "namespace": "monitoring"}
    (rule,) = yaml.safe_load(adapter["data"]["config.yaml"])["rules"]
    query = re.search(r'__name__=~"([^"]+)"', rule["seriesQuery"])
    assert query is not None
    hpa = one(folder, "HorizontalPodAutoscaler", "demo-awq-engine")["spec"]["metrics"]
    for name in (metric["pods"]["metric"]["name"] for metric in hpa):
        assert re.fullmatch(query[1], name.replace("slipway_", "slipway:", 1))


def test_kustomize_labels_every_object_and_no_selector(tmp_path: Path) -> None:
    written(on_gpu(), tmp_path / "b", cluster())
    built = kustomized(tmp_path / "b" / "overlays" / "production")
    common = {
        "app.kubernetes.io/part-of": "demo-awq",
        "app.kubernetes.io/instance": "demo-awq",
        "app.kubernetes.io/managed-by": "slipway",
    }
    version = {"app.kubernetes.io/version": "3"}
    for each in built:
        assert (common | version).items() <= each["metadata"]["labels"].items(), each["metadata"]["name"]
        if each["kind"] == "Deployment":
            assert list(each["spec"]["selector"]["matchLabels"]) == ["app.kubernetes.io/name"]
            own = each["spec"]["template"]["metadata"]["labels"]
            assert common.items() <= own.items()
            # Gateway and Redis go on running when the next version comes.
            expected = "3" if own["app.kubernetes.io/component"] == "engine" else None
            assert own.get("app.kubernetes.io/version") == expected


def test_kustomize_takes_redis_by_digest_and_counts_pulled_weights_as_storage(tmp_path: Path) -> None:
    weights = manifest(files=files(10 * 2**30))
    written(evidence(manifest=weights), tmp_path / "b", cluster())
    overlay = tmp_path / "b" / "overlays" / "pulled"
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [../../base]\n"
        "components: [../../weights]\n"
    )
    built = [each for each in kustomized(overlay) if each["kind"] == "Deployment"]
    found = {each["metadata"]["name"]: each["spec"]["template"]["spec"] for each in built}
    assert found["demo-awq-redis"]["containers"][0]["image"] == REDIS
    limits = {
        container["name"]: container["resources"]["limits"]["ephemeral-storage"]
        for pod in found.values()
        for container in pod["containers"]
    }
    # Twice the weights, and each container's own.
    assert limits == {"engine": "28Gi", "gateway": "20992Mi", "discover": "64Mi", "redis": "64Mi"}


# The numbers


def test_targets_are_the_measured_capacity_with_headroom() -> None:
    found = numbers(on_gpu())
    # Twelve requests a second of two seconds are 24 under way.
    assert (found["capacity"].value, found["in_flight"].value, found["parallel"].value) == (12.0, 24.0, 24)
    assert found["outstanding_target"].value == "16800m"
    # Sixty a second in the busiest hour, half as much again, at 8.4 a replica.
    assert found["most_replicas"].value == 11
    assert found["gpu_memory_share"].value == round(73_000_000_000 / 85520809984, 3)


def test_a_service_level_that_was_not_set_is_the_usual_one() -> None:
    plain = manifest(gates=[load_gate({})])
    found = numbers(evidence(manifest=plain))
    assert found["p95_seconds"].value == 0.5
    assert "the default of 500 ms" in found["p95_seconds"].why


@pytest.mark.parametrize(("context", "seconds"), [(1024, 17), (1_000_000, 600)])
def test_a_server_is_given_the_time_of_its_longest_answer(context: int, seconds: int) -> None:
    assert numbers(evidence(context=context))["grace_seconds"].value == seconds


def test_every_number_has_a_reason() -> None:
    for given in (evidence(), on_gpu()):
        assert all(len(number.why) > 10 for number in numbers(given).values())


# The autoscaler's arithmetic

REPLICA = SimulatedReplica(capacity=10, in_flight=20, start_seconds=30, slack_seconds=1)
BEHAVIOUR = Behaviour(least=2, most=20, up_seconds=30, down_window_seconds=300)


def steady(rate: float, ticks: int = 960) -> Day:
    return Day([rate] * ticks, [1.0] * ticks)


def test_a_steady_load_gets_the_replicas_that_its_target_asks_for() -> None:
    done = simulate(steady(55), REPLICA, BEHAVIOUR, [outstanding(0.7 * 20)])
    # 55 requests a second at seven a replica.
    assert done.replicas[-1] == 8
    assert done.replicas[0] == 2
    assert simulate(steady(55), REPLICA, BEHAVIOUR, [request_count(7)]).replicas[-1] == 8


def test_replicas_at_most_double_in_the_time_of_a_start() -> None:
    done = simulate(steady(150), REPLICA, BEHAVIOUR, [outstanding(14)])
    assert [done.replicas[tick] for tick in (0, 1, 2, 3, 4)] == [2, 4, 4, 8, 8]


def test_nothing_moves_within_a_tenth() -> None:
    done = simulate(steady(14.5), REPLICA, BEHAVIOUR, [outstanding(14)])
    assert set(done.replicas) == {2}


def test_replicas_go_one_a_minute_after_the_window() -> None:
    day = Day([100.0] * 200 + [7.0] * 200, [1.0] * 400)
    done = simulate(day, REPLICA, BEHAVIOUR, [outstanding(14)])
    high = done.replicas[199]
    falls = [tick for tick in range(200, 400) if done.replicas[tick] < done.replicas[tick - 1]]
    assert falls[0] >= 200 + 300 // 15
    assert all(after - before >= 4 for before, after in itertools.pairwise(falls))
    assert done.replicas[-1] == max(2, high - len(falls))


def test_more_than_there_is_waits_and_is_late() -> None:
    still = Behaviour(least=2, most=2, up_seconds=30, down_window_seconds=300)
    assert simulate(steady(19), REPLICA, still, [outstanding(14)]).late == 0
    assert simulate(steady(30), REPLICA, still, [outstanding(14)]).late_share > 0.9


def test_a_count_of_requests_does_not_see_heavy_ones_and_the_memory_gauge_sees_nothing() -> None:
    heavy = Day([30.0] * 960, [2.0] * 960)
    assert simulate(heavy, REPLICA, BEHAVIOUR, [outstanding(14)]).late_share < 0.1
    assert simulate(heavy, REPLICA, BEHAVIOUR, [request_count(7)]).late_share > 0.8
    assert set(simulate(heavy, REPLICA, BEHAVIOUR, [memory_gauge()]).replicas) == {2}


def test_a_day_has_its_requests_and_the_same_seed_the_same_day() -> None:
    hourly = [float(10 + hour) for hour in range(24)]
    day = make_day(hourly, [1.0] * 24, bursts=[11], seed=4)
    assert day == make_day(hourly, [1.0] * 24, bursts=[11], seed=4)
    assert sum(day.rates) * 15 == pytest.approx(3600 * sum(hourly) + 600 * 21, rel=0.01)


# The replicas beside the gateway


def test_the_routes_have_every_replica_that_the_service_names(tmp_path: Path) -> None:
    backend = '{"release": "demo-awq@v3", "weight": 100, "replicas": []}'
    template = json.loads(f'{{"models": {{"demo": {{"served_as": "demo", "backends": [{backend}]}}}}}}')
    made = discover.routes(template, ["10.0.0.1", "fd00::1"], 8000)
    assert made["models"]["demo"]["backends"][0]["replicas"] == [
        {"name": "10.0.0.1", "url": "http://10.0.0.1:8000"},
        {"name": "fd00--1", "url": "http://[fd00::1]:8000"},
    ]
    assert template["models"]["demo"]["backends"] == [json.loads(backend)]
    discover.write(tmp_path / "routes.json", made)
    assert json.loads((tmp_path / "routes.json").read_text()) == made
    assert [path.name for path in tmp_path.iterdir()] == ["routes.json"]


def test_a_name_is_looked_up_and_a_service_without_replicas_has_none() -> None:
    assert "127.0.0.1" in (discover.addresses("localhost", 80) or [])
    assert discover.addresses("nothing.invalid", 80) in ([], None)


def test_evidence_without_answers_still_gives_numbers() -> None:
    assert isinstance(numbers(evidence(measured=measured(requests=[])))["in_flight"].value, float)
