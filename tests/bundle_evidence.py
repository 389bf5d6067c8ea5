"""Evidence for bundles: a release on CPU as the demo's, and one on a GPU with its capacity searched for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from containers.kubernetes.bundle import Images, Written, write_bundle
from containers.kubernetes.cluster import Cluster
from containers.kubernetes.numbers import Evidence

DIGEST = "sha256:" + "ab" * 32
REDIS = f"registry.example:5000/valkey@sha256:{'ef' * 32}"
GATEWAY = f"registry.example/slipway-gateway@sha256:{'cd' * 32}"
IMAGE = {"user": 65534, "port": 8000}


def manifest(**changes: object) -> dict[str, Any]:
    limits = {"p95_latency_ms": 2000.0, "error_rate": 0.0, "peak_memory_bytes": 3.4e9}
    image = {"reference": f"registry.example/demo@{DIGEST}", "digest": DIGEST, "minimum_driver": None}
    return {
        "model": "demo", "scheme": "awq", "image": image, "files": {"model.safetensors": {"size": 3_800_000}},
        "hardware": {"cores": 2, "accelerators": []},
        "gates": [{"verdict": {"gate": "load", "limits": limits}}], **changes,
    }  # fmt: skip


def evidence(**changes: object) -> Evidence:
    """The demo's: four requests a second were asked for, on two cores."""
    metrics = {
        "start_seconds": 23.9, "peak_memory_bytes": 2.4e9, "p95_latency_ms": 97.4, "p99_tpot_ms": 2.5,
        "requests_per_second": 4.1, "output_tokens_per_second": 131.0,
    }  # fmt: skip
    load = {
        "metrics": metrics, "memory": {"limit_bytes": 4 * 2**30, "peak": {"memory_bytes": 2_400_000_000}},
        "server": {"start_seconds": 23.9, "cpus": None}, "capacity": None,
    }  # fmt: skip
    given: dict[str, Any] = {
        "manifest": manifest(), "manifest_digest": DIGEST, "version": "3", "load": load, "context": 1024,
        "requests": [{"error": None, "latency_ms": 65.0 + row, "output_tokens": 32} for row in range(40)],
    }  # fmt: skip
    return Evidence(**{**given, **changes})


def on_gpu() -> Evidence:
    """A larger model on a GPU: 12 requests a second at the service level, two seconds each."""
    plain = evidence()
    load = {
        **plain.load,
        "memory": {"limit_bytes": 32 * 2**30, "peak": {"gpu_memory_bytes": 73_000_000_000}},
        "metrics": {**plain.load["metrics"], "kv_cache_used_peak": 0.61},
        "capacity": {
            "requests_per_second": 12.0, "output_tokens_per_second": 1500.0,
            "steps": [{"rate": 12.0, "metrics": {"mean_latency_ms": 2000.0}}],
        },
    }  # fmt: skip
    gpu = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 85520809984, "driver": "580.65.06"}
    image = {"reference": f"registry.example/demo@{DIGEST}", "digest": DIGEST, "minimum_driver": "580.65.06"}
    released = manifest(image=image, hardware={"cores": 16, "accelerators": [gpu]})
    return evidence(manifest=released, load=load, context=8192, hourly=[20.0] * 23 + [60.0])


def cluster(**changes: object) -> Cluster:
    """A cluster with everything of its own."""
    return Cluster.model_validate({
        "runtime_class": "nvidia", "image_pull_secrets": ["registry"], "priority_class": "release-critical",
        "surge": False, "cpu_request": 1.5, "cpu_limits": True, "ephemeral_storage": "8Gi",
        "monitor_labels": {"release": "kube-prometheus-stack"}, "redis_image": REDIS, "dns": "openshift",
        "dns_addresses": ["169.254.20.10", "fd00::a"], **changes,
    })  # fmt: skip


def written(given: Evidence, folder: Path, placed: Cluster | None = None) -> Written:
    return write_bundle(given, IMAGE, folder, images=Images(gateway=GATEWAY), cluster=placed)
