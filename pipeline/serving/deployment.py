"""Reads what a Kubernetes bundle is made from: a release's evidence, and the cluster's description."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from containers.image.build import ImageRecord, parse_image
from containers.image.serving import default_context
from containers.kubernetes.admission import Admission
from containers.kubernetes.cluster import Cluster
from containers.kubernetes.numbers import AnsweredRequest, BundleEvidence, Number, ReplicaMeasurements
from containers.sandbox.container import SHARED_MEMORY_BYTES
from evals.load.cost import parse_cost
from evals.load.evidence import LoadEvidence, parse_load_evidence
from evals.load.requests import RequestRecord, parse_requests
from evals.load.variants import folder as variant_folder
from evals.report import autoscaling
from evals.report.svg import standalone
from pipeline.errors import PlanError, SpecError
from pipeline.planner.facts import read_facts
from pipeline.settings import Settings
from pipeline.trust import trust_of
from pipeline.yaml_file import explain, keys, listed, read
from registry.manifest import EVIDENCE
from registry.policy import policy_of
from registry.pull import ReleaseMetadata, read_metadata

_TESTED = ("load.json", "requests.jsonl")
_FILES = ("image.json", "cost.json")


def gather(reference: str, settings: Settings, variant: str | None = None) -> tuple[BundleEvidence, ImageRecord]:
    """Read the evidence of the release ``NAME[@ALIAS]``, or of a variant of it, verified, and what its image is.

    Raises:
        RegistryError: there is no such release, it is not what was signed, or it does not list the variant.
        PlanError: the release has no load test, or its evidence can't be read.
        LoadEvidenceError, ImageError: its evidence does not have the expected form.
    """
    tested = EVIDENCE if variant is None else f"{EVIDENCE}/{variant_folder(variant)}"
    names = ["config.json", *(f"{tested}/{name}" for name in _TESTED), *(f"{EVIDENCE}/{name}" for name in _FILES)]
    found = read_metadata(reference, names, tracking_uri=settings.tracking_uri, trusted_keys=trust_of(settings))
    configuration = found.manifest.configuration(variant)
    config_file, load_file, requests_file, image_file, _ = names
    image = parse_image(_file(found, image_file), f"{image_file} of {found.manifest.name}")
    config = _document(found, config_file)
    load = parse_load_evidence(_file(found, load_file), f"{load_file} of {found.manifest.name}")
    requests = parse_requests(found.files.get(requests_file, b""), f"{requests_file} of {found.manifest.name}")
    evidence = BundleEvidence(
        manifest=found.manifest,
        version=found.version,
        measured=measurements(load, requests),
        context=(configuration and configuration.context) or default_context(config) or read_facts(config).context,
        variant=None if variant is None else configuration,
        hourly=_hourly(found),
    )
    return evidence, image


def cluster(path: Path) -> Cluster:
    """Read the description of a cluster.

    Raises:
        SpecError: listing every key that is unknown or wrong.
    """
    try:
        return Cluster.model_validate(read(path))
    except ValidationError as error:
        problems = (explain(detail, keys(Cluster)) for detail in error.errors())
        raise SpecError(listed(f"{path} is not a valid description of a cluster:", problems)) from error


def admission(settings: Settings, scan_age_days: int) -> Admission:
    """What admission controllers shall check: the conditions under which this home trusts releases.

    Raises:
        RegistryError: the policy or a key can't be read.
    """
    policy = policy_of(trust_of(settings))
    keys = tuple(key.pem().decode() for key in policy.keys if key.is_elliptic)
    return Admission(keys, scan_age_days, policy.required_gates)


def measurements(load: LoadEvidence, requests: Sequence[RequestRecord]) -> ReplicaMeasurements:
    """The measurements of a load test that a bundle needs."""
    capacity = load.capacity
    rate = capacity.requests_per_second if capacity else None
    at_capacity = [step for step in capacity.steps if step.rate == rate] if capacity else []
    return ReplicaMeasurements(
        metrics=load.metrics,
        start_seconds=load.server.start_seconds,
        memory_limit_bytes=load.memory.limit_bytes,
        ranks=load.server.ranks,
        shared_memory_bytes=load.server.ranks * SHARED_MEMORY_BYTES,
        gpus=len(load.server.gpus),
        gpu_memory_share=max(
            (gpu.peak_bytes / gpu.total_bytes for gpu in load.memory.gpus if gpu.peak_bytes is not None), default=None
        ),
        cores=load.server.cores,
        capacity=rate,
        capacity_latency_ms=at_capacity[0].metrics.get("mean_latency_ms") if at_capacity else None,
        requests=[
            AnsweredRequest(request.latency_ms, request.output_tokens)
            for request in requests
            if request.answered and request.latency_ms is not None
        ],
    )


def simulated(evidence: BundleEvidence, found: Mapping[str, Number]) -> dict[str, str]:
    """A simulated day under the bundle's autoscaler, as files: the outcome and its picture."""
    outcome = autoscaling.compare(found, evidence.metrics.get("p95_latency_ms"), evidence.hourly)
    return {
        "autoscaling/simulation.json": outcome.format() + "\n",
        "autoscaling/simulation.svg": standalone(autoscaling.picture(outcome)) + "\n",
    }


def _hourly(found: ReleaseMetadata) -> Sequence[float] | None:
    """Requests a second in each hour of the day that the model's file plans for, if it does."""
    name = f"{EVIDENCE}/cost.json"
    data = found.files.get(name)
    day = parse_cost(data, f"{name} of {found.manifest.name}").day if data else None
    return day.requests_per_second if day else None


def _file(found: ReleaseMetadata, name: str) -> bytes:
    if name not in found.files:
        raise PlanError(f"{found.manifest.name} has no {name}: release it again")
    return found.files[name]


def _document(found: ReleaseMetadata, name: str) -> dict[str, Any]:
    document = json.loads(_file(found, name))
    if not isinstance(document, dict):
        raise PlanError(f"{name} of {found.manifest.name} is not a JSON object: release it again")
    return document
