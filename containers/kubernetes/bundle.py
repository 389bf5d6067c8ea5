"""Writes a release's bundle: Kustomize base, components and overlays, from templates and the release's evidence."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jinja2
import yaml

from containers.errors import ContainerError
from containers.gateway.config import Backend, GatewaySettings, ModelRoute, Routes
from containers.hardware.cpu import NODE_TERMS
from containers.image.build import ImageRecord
from containers.kubernetes.admission import Admission, spellings
from containers.kubernetes.alerts import alerts, healthy, recordings
from containers.kubernetes.cluster import Cluster
from containers.kubernetes.dashboard import dashboard
from containers.kubernetes.helm import chart, with_placeholders
from containers.kubernetes.kserve import inference_service, llm_inference_service
from containers.kubernetes.names import mebibytes, object_name, thousandths
from containers.kubernetes.numbers import BundleEvidence, Number, numbers, progress_seconds, tested_cores
from containers.kubernetes.values import TemplateValues
from registry.manifest import ADAPTERS, DRAFT_MODEL

TEMPLATES = Path(__file__).with_name("templates")
NAMESPACE = "slipway"
Form = Literal["kustomize", "helm", "kserve", "llm-d"]
_MODEL_FOLDER = "/model"
_TOKENIZER = "/srv/tokenizer"
# The image of the gateway's Redis; Valkey 8 is the newest line with a free licence.
_REDIS = ("docker.io/valkey/valkey", "8-alpine")
# Disk space of a gateway for the tokenizer, its routes and its log; a choice, well above what it uses.
_GATEWAY_MEBIBYTES = 512


class BundleError(ContainerError):
    """A bundle can't be written; the message says why."""


@dataclass(frozen=True)
class Images:
    """The gateway's image, ``REPOSITORY@sha256:…``, or None if it is not known yet.

    ``engine`` replaces the repository of the release's image, if the image was copied.
    """

    gateway: str | None = None
    engine: str | None = None


@dataclass(frozen=True)
class WrittenBundle:
    """A bundle on disk.

    ``name`` begins its objects' names; ``warnings`` say what must be done before it can be applied.
    """

    name: str
    folder: Path
    files: tuple[str, ...]
    numbers: Mapping[str, Number]
    warnings: tuple[str, ...]


def write_bundle(
    evidence: BundleEvidence,
    image: ImageRecord,
    folder: Path,
    *,
    images: Images | None = None,
    cluster: Cluster | None = None,
    namespace: str = NAMESPACE,
    monitoring_namespace: str = "monitoring",
    admission: Admission | None = None,
    form: Form = "kustomize",
    more: Callable[[Mapping[str, Number]], Mapping[str, str]] = lambda _: {},
) -> WrittenBundle:
    """Write the bundle into ``folder``, which must be empty or absent; it is written completely or not at all.

    Args:
        evidence: the release's manifest, load test and requests.
        image: what the release's image is.
        folder: the bundle's folder.
        images: the images besides the engine's.
        cluster: settings of the cluster.
        namespace: the namespace that it runs in.
        monitoring_namespace: Prometheus' namespace.
        admission: what admission controllers check; without it, or for an image that was not pushed, the bundle has no
            ``policies/``.
        form: Kustomize files, a Helm chart of the same objects, or the engine alone: as KServe's InferenceService, or
            as its LLMInferenceService with llm-d's scheduler.
        more: returns further files of a Kustomize bundle by path, from the numbers.

    Raises:
        BundleError: the folder is not empty, or the evidence is incomplete.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BundleError(f"{folder} is not empty: choose another folder, or remove it")
    if not evidence.measured.start_seconds:
        raise BundleError("no server started in the load test (load.json: server.start_seconds): release again")
    cluster = cluster or Cluster()
    found = {**numbers(evidence), "progress_seconds": progress_seconds(evidence, image.size_bytes)}
    if cluster.cpu_request is not None:
        _check_request(cluster, tested_cores(evidence)[0])
        found["cpu_request"] = Number(thousandths(1000 * cluster.cpu_request), "the cluster's file: cpu_request")
    values = _values(
        evidence,
        image,
        images or Images(),
        found,
        cluster,
        admission,
        namespace=namespace,
        monitoring_namespace=monitoring_namespace,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        files = _render(values if form != "helm" else with_placeholders(values))
        files |= _documents(evidence, values, found, files["monitoring/rules.yaml"])
        if form == "helm":
            files = chart(files, values)
        elif form in {"kserve", "llm-d"}:
            engine = files["base/engine.yaml"]
            policies = {name: text for name, text in files.items() if name.startswith("policies/")}
            if form == "kserve":
                files = {"inferenceservice.yaml": inference_service(engine, values), **policies}
            else:
                files = {"llminferenceservice.yaml": llm_inference_service(engine, values, image), **policies}
        else:
            files |= more(found)
        for name, text in files.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_text(text, encoding="utf-8")
        part.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    except BaseException:  # also after Ctrl-C no half-written bundle stays
        shutil.rmtree(part, ignore_errors=True)
        raise
    return WrittenBundle(values.name, folder, tuple(sorted(files)), found, tuple(_warnings(values, form)))


def _values(
    evidence: BundleEvidence,
    image: ImageRecord,
    images: Images,
    found: Mapping[str, Number],
    cluster: Cluster,
    admission: Admission | None,
    *,
    namespace: str,
    monitoring_namespace: str,
) -> TemplateValues:
    manifest = evidence.manifest
    line = manifest.name
    name = object_name(line)
    reference, digest = manifest.image.reference, manifest.image.digest
    in_registry = "@" in reference
    pushed = in_registry or images.engine is not None
    repository = images.engine or (reference.partition("@")[0] if in_registry else f"registry.invalid/{name}")
    gateway, _, gateway_digest = (images.gateway or "registry.invalid/slipway-gateway").partition("@")
    redis, _, redis_digest = (cluster.redis_image or _REDIS[0]).partition("@")
    driver = manifest.image.minimum_driver or "0.0"
    major, minor = [*(int(part) for part in driver.split(".")[:2]), 0][:2]
    share = float(found["gpu_memory_share"].value)
    storage, weights = cluster.ephemeral_storage, _weights_mebibytes(evidence)
    return TemplateValues(
        name=name,
        line=line,
        model=manifest.model,
        version=evidence.version,
        digest=manifest.digest,
        n=found,
        namespace=namespace,
        monitoring_namespace=monitoring_namespace,
        cluster=cluster,
        admission=admission if pushed and admission and admission.keys else None,
        image=f"{repository}@{digest}",
        repository=repository,
        image_digest=digest,
        pushed=pushed,
        user=image.user,
        port=image.port,
        model_folder=_MODEL_FOLDER,
        variant=None if evidence.variant is None else evidence.variant.variant,
        arguments=list(evidence.serving.command) if evidence.serving else None,
        beside=[*([ADAPTERS] if manifest.adapters else []), *([DRAFT_MODEL] if manifest.draft_model else [])],
        on_gpu=evidence.on_gpu,
        cpu_terms=NODE_TERMS,
        unbound_ranks=evidence.measured.ranks > 1 and not evidence.on_gpu,
        driver=driver,
        driver_major=major,
        driver_minor=minor,
        gpu_target=thousandths(math.ceil(1000 * (share + (1 - share) / 2))),
        gateway_name=gateway,
        gateway_digest=gateway_digest,
        gateway_known=bool(gateway_digest),
        redis_name=redis,
        redis_digest=redis_digest,
        redis_tag=_REDIS[1],
        weights_limit=mebibytes(weights),
        storage=mebibytes(storage) if storage else None,
        storage_with_weights=mebibytes(storage + weights) if storage else None,
        gateway_storage=mebibytes(_GATEWAY_MEBIBYTES),
        gateway_storage_with_weights=mebibytes(_GATEWAY_MEBIBYTES + weights),
        searched=evidence.searched,
        recordings=recordings(name),
        alerts=alerts(name, found),
        more=partial(_further_limits, cluster),
    )


def _further_limits(cluster: Cluster, cpu: str, storage: str) -> str:
    """Return further limits of a small container, to write after its memory limit."""
    limits = [*([f'cpu: "{cpu}"'] if cluster.cpu_limits else []),
              *([f"ephemeral-storage: {storage}"] if cluster.ephemeral_storage else [])]  # fmt: skip
    return "".join(f", {each}" for each in limits)


def _check_request(cluster: Cluster, cores: float) -> None:
    """Refuse a CPU request above the limit, as Kubernetes would."""
    if cluster.cpu_limits and cluster.cpu_request is not None and cluster.cpu_request > cores:
        raise BundleError(
            f"`cpu_request` is {cluster.cpu_request:g}, above the limit that `cpu_limits` sets: {cores:g}, the cores "
            "of the load test; lower it, or remove `cpu_limits`"
        )


def _weights_mebibytes(evidence: BundleEvidence) -> float:
    """Return twice the size of the release's files: a pull in progress may hold each of them twice."""
    return 2 * sum(file.size for file in evidence.manifest.files.values()) / 2**20


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,  # noqa: S701 - YAML is written, not HTML
    )  # fmt: skip
    environment.filters |= {"quoted": json.dumps, "spellings": spellings}
    return environment


def _render(values: TemplateValues) -> dict[str, str]:
    """Render every template; its path, without `.j2`, is the path of the file."""
    environment = _environment()
    names = sorted(path.relative_to(TEMPLATES).as_posix() for path in TEMPLATES.rglob("*.j2"))
    if values.admission is None:
        names = [name for name in names if not name.startswith("policies/")]
    return {name.removesuffix(".j2"): environment.get_template(name).render(vars(values)) for name in names}


def _documents(
    evidence: BundleEvidence, values: TemplateValues, found: Mapping[str, Number], rules: str
) -> dict[str, str]:
    """Return the files that no template makes: gateway settings and routes, rules and their tests, the dashboard."""
    name = values.name
    return {
        "base/gateway.json": _gateway(name, found) + "\n",
        "base/routes.json": _routes(evidence, values.line, found) + "\n",
        "base/discover.py": Path(__file__).with_name("discover.py").read_text(encoding="utf-8"),
        "monitoring/prometheusrule.yaml": _prometheus_rule(name, rules, values.cluster.monitor_labels),
        "monitoring/rules_test.yaml": _rule_tests(name, found),
        "monitoring/dashboard.json": dashboard(name, evidence.version, found),
    }


def _gateway(name: str, found: Mapping[str, Number]) -> str:
    settings = GatewaySettings.model_validate({
        "keys": "/etc/slipway-keys/keys.json", "routes": "/run/slipway/routes.json", "host": "0.0.0.0",  # noqa: S104
        "port": 8080, "admin_host": "0.0.0.0", "admin_port": 9090, "redis": f"redis://{name}-redis:6379/0",  # noqa: S104
        "queue_size": found["queue_size"].value, "queue_timeout_s": found["queue_timeout"].value,
        "request_timeout_s": found["request_timeout"].value, "drain_delay_s": found["drain_seconds"].value,
        "drain_timeout_s": found["grace_seconds"].value,
    })  # fmt: skip
    return settings.model_dump_json(exclude_unset=True, indent=1)


def _routes(evidence: BundleEvidence, line: str, found: Mapping[str, Number]) -> str:
    """Return the gateway's routes without replicas, which ``discover.py`` fills in."""
    route = ModelRoute(
        served_as=evidence.manifest.model,
        tokenizer=Path(_TOKENIZER),
        context=evidence.context,
        parallel=int(found["parallel"].value),
        adapters=tuple(evidence.manifest.adapters),
        backends=(Backend(release=f"{line}@v{evidence.version}", weight=100, replicas=()),),
    )
    return Routes(models={evidence.manifest.model: route}).model_dump_json(exclude_unset=True, indent=1)


def _prometheus_rule(name: str, rules: str, labels: Mapping[str, str]) -> str:
    """Return the rules, with their comments, as a PrometheusRule of the operator."""
    head = f"apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n  name: {name}\n"
    head += f"  labels: {json.dumps(dict(labels))}\nspec:\n" if labels else "spec:\n"
    return head + "".join(f"  {line}\n" if line else "\n" for line in rules.splitlines())


def _rule_tests(name: str, found: Mapping[str, Number]) -> str:
    """Return promtool's tests: one per recording rule and alert, and one on healthy series where none fires."""
    well = healthy(name, found)
    every = alerts(name, found)

    def inputs(changed: Mapping[str, str]) -> list[dict[str, str]]:
        return [{"series": series, "values": values} for series, values in {**well, **changed}.items()]

    quiet = [{"eval_time": "90m", "alertname": alert.name, "exp_alerts": []} for alert in every]
    pods = [f'{{namespace="slipway", pod="{name}-engine-{pod}"}}' for pod in ("a", "b")]
    signals = [
        {
            "expr": series,
            "eval_time": "60m",
            "exp_samples": [{"labels": series + pod, "value": value} for pod in pods],
        }
        for series, value in (
            ("slipway:requests_waiting", 1), ("slipway:requests_outstanding", 4), ("slipway:kv_cache_used", 0.3),
        )
    ]  # fmt: skip
    tests: list[dict[str, object]] = [
        {"name": "a healthy day", "interval": "1m", "input_series": inputs({}), "alert_rule_test": quiet,
         "promql_expr_test": signals},
    ]  # fmt: skip
    for alert in every:
        expected = {
            "exp_labels": {"severity": alert.severity, "release": name, **alert.labels},
            "exp_annotations": {"summary": alert.summary},
        }
        tests.append({
            "name": alert.name, "interval": "1m", "input_series": inputs(alert.firing),
            "alert_rule_test": [
                {"eval_time": f"{alert.at}m", "alertname": alert.name, "exp_alerts": [expected]},
            ],
        })  # fmt: skip
    document = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}
    head = "# promtool test rules rules_test.yaml: each alert fires on a test series, and none on healthy series.\n"
    return head + str(yaml.safe_dump(document, sort_keys=False, width=1000))


def _warnings(values: TemplateValues, form: Form) -> list[str]:
    warnings = []
    if not values.pushed:
        warnings.append(
            "the release's image was not pushed: set SLIPWAY_IMAGE_REGISTRY and release again, or pass --image"
        )
    if not values.searched:
        warnings.append(
            "the load test did not measure the capacity (`load.capacity`): scaling assumes the load test's traffic"
        )
    if form in {"kustomize", "helm"} and not values.gateway_known:
        warnings.append(
            "the gateway's image is unknown: set SLIPWAY_IMAGE_REGISTRY and run `slipway image gateway`, or pass "
            "--gateway-image REPOSITORY@sha256:…"
        )
    return warnings
