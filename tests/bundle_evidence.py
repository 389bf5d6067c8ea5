"""Evidence for bundles: a release on CPU as the demo's, and one on a GPU with its capacity searched for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import load_evidence
import yaml
from image_record import image_record
from release_folder import serving

from containers.kubernetes.bundle import Images, WrittenBundle, write_bundle
from containers.kubernetes.cluster import Cluster
from containers.kubernetes.numbers import BundleEvidence, ReplicaMeasurements
from pipeline.serving.deployment import measurements
from registry.manifest import Manifest
from registry.verdict import Verdict

DIGEST = "sha256:" + "ab" * 32
REDIS = f"registry.example:5000/valkey@sha256:{'ef' * 32}"
GATEWAY = f"registry.example/slipway-gateway@sha256:{'cd' * 32}"


def manifest(**changes: object) -> Manifest:
    """The manifest of the demo's release; ``changes`` are of its keys."""
    limits = {"p95_latency_ms": 2000.0, "error_rate": 0.0, "peak_memory_bytes": 3.4e9}
    weights = files(3_800_000)
    document = {
        "schema": "slipway.release/v1", "model": "demo", "scheme": "awq", "created": "2026-11-24T01:02:03Z",
        "source": {"uri": "hf://org/demo", "revision": "0" * 40, "files": weights}, "files": weights,
        "quantizer": {
            "backend": "autoawq", "version": "0.2.9", "method": "awq", "parameters": {}, "calibration": None,
            "pins_digest": DIGEST,
        },
        "sbom": {"path": "release/evidence/sbom.cdx.json", "digest": DIGEST},
        "hardware": {"machine": "x86_64", "cpu": "AMD EPYC", "cores": 2, "memory_bytes": 8 * 2**30},
        "image": image(), "gates": [load_gate(limits)], **changes,
    }  # fmt: skip
    return Manifest.model_validate_json(json.dumps(document))


def engine_container(bundle: Path) -> dict[str, Any]:
    """The engine's container in a bundle that was written to a folder."""
    documents = yaml.safe_load_all((bundle / "base" / "engine.yaml").read_text())
    (engine,) = (each for each in documents if each["kind"] == "Deployment")
    (container,) = engine["spec"]["template"]["spec"]["containers"]
    return dict(container)


def files(weights_bytes: int) -> dict[str, object]:
    """The files of a release whose weights have that size."""
    sizes = {"model.safetensors": weights_bytes, "release/evidence/load.json": 0, "release/evidence/sbom.cdx.json": 0}
    return {name: {"sha256": "ab" * 32, "size": size} for name, size in sizes.items()}


def image(**changes: object) -> dict[str, object]:
    """The image of the release; by default pushed to a registry and in no need of a GPU."""
    return {
        "reference": f"registry.example/demo@{DIGEST}", "digest": DIGEST, "base_digest": DIGEST, "pins_digest": DIGEST,
        "runtime": "vllm-cpu", "minimum_driver": None, **changes,
    }  # fmt: skip


def load_gate(limits: Mapping[str, float]) -> dict[str, object]:
    """The load gate's record in a manifest."""
    verdict = Verdict(gate="load", status="pass", reason="within its limits", limits=limits)
    return {"verdict": verdict.model_dump(mode="json"), "evidence": {"release/evidence/load.json": DIGEST}}


def measured(**changes: object) -> ReplicaMeasurements:
    """What the demo's load test measured: four requests a second were sent; its cores are not known."""
    found = replace(measurements(load_evidence.measured(), load_evidence.requests()), cores=None)
    return replace(found, **changes)  # type: ignore[arg-type]  # by name


def evidence(**changes: object) -> BundleEvidence:
    """The evidence of the demo's release."""
    given: dict[str, Any] = {"manifest": manifest(), "version": "3", "measured": measured(), "context": 1024}
    return BundleEvidence(**{**given, **changes})


def on_gpu() -> BundleEvidence:
    """A larger model on a GPU: 12 requests a second at the service level, two seconds each."""
    served = measured(
        metrics={**measured().metrics, "kv_cache_used_peak": 0.61}, memory_limit_bytes=32 * 2**30,
        gpus=1, gpu_memory_share=73_000_000_000 / 85_520_809_984, capacity=12.0, capacity_latency_ms=2000.0,
    )  # fmt: skip
    gpu = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 85520809984, "driver": "580.65.06"}
    hardware = {"machine": "x86_64", "cpu": "AMD EPYC", "cores": 16, "memory_bytes": 2**38, "accelerators": [gpu]}
    released = manifest(image=image(minimum_driver="580.65.06"), hardware=hardware)
    return evidence(manifest=released, measured=served, context=8192, hourly=[20.0] * 23 + [60.0])


def on_four_gpus() -> BundleEvidence:
    """As `on_gpu`, with the model divided among four GPUs."""
    alone = on_gpu()
    arguments = ("--model", "/model", "--tensor-parallel-size", "4")
    served = serving(None, arguments).model_copy(update={"tensor_parallel": 4})
    return replace(
        alone,
        manifest=alone.manifest.model_copy(update={"serving": (served,)}),
        measured=replace(alone.measured, ranks=4, gpus=4, shared_memory_bytes=4 * 2**30),
    )


def cluster(**changes: object) -> Cluster:
    """A cluster with everything of its own."""
    return Cluster.model_validate({
        "runtime_class": "nvidia", "image_pull_secrets": ["registry"], "priority_class": "release-critical",
        "surge": False, "cpu_request": 1.5, "cpu_limits": True, "ephemeral_storage": "8Gi",
        "monitor_labels": {"release": "kube-prometheus-stack"}, "redis_image": REDIS, "dns": "openshift",
        "dns_addresses": ["169.254.20.10", "fd00::a"], **changes,
    })  # fmt: skip


def written(given: BundleEvidence, folder: Path, placed: Cluster | None = None) -> WrittenBundle:
    return write_bundle(given, image_record(), folder, images=Images(gateway=GATEWAY), cluster=placed)
