"""What a bundle is made from, out of the registry."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from containers.image.build import served_context
from containers.kubernetes.cluster import Cluster
from containers.kubernetes.numbers import Evidence, Number
from evals.report import autoscaling
from evals.report.svg import standalone
from pipeline.errors import PlanError, SpecError
from pipeline.planner.facts import read_facts
from pipeline.settings import Settings
from pipeline.trust import trust_of
from pipeline.yaml_file import explain, keys, listed, read
from registry.manifest import EVIDENCE
from registry.pull import Glance, glance

_FILES = ("load.json", "requests.jsonl", "image.json", "cost.json")


def gather(reference: str, settings: Settings) -> tuple[Evidence, Mapping[str, Any]]:
    """Read the evidence of the release ``NAME[@ALIAS]``, verified, and its ``image.json``.

    Raises:
        RegistryError: there is no such release, or it is not what was signed.
        PlanError: it has no load test, or can't be read.
    """
    names = ["config.json", *(f"{EVIDENCE}/{name}" for name in _FILES)]
    found = glance(reference, names, tracking_uri=settings.tracking_uri, trusted_keys=trust_of(settings))
    load, image, config = (_document(found, name) for name in (names[1], names[3], names[0]))
    rows = [json.loads(line) for line in found.files.get(f"{EVIDENCE}/requests.jsonl", b"").splitlines()]
    evidence = Evidence(
        manifest=found.manifest.model_dump(mode="json", by_alias=True),
        manifest_digest=found.manifest.digest,
        version=found.version,
        load=load,
        requests=rows,
        context=served_context(config) or read_facts(config).context,
        hourly=_hourly(found),
    )
    return evidence, image


def cluster(path: Path) -> Cluster:
    """Read what is the cluster's own.

    Raises:
        SpecError: listing every key that is unknown or wrong.
    """
    try:
        return Cluster.model_validate(read(path))
    except ValidationError as error:
        problems = (explain(detail, keys(Cluster)) for detail in error.errors())
        raise SpecError(listed(f"{path} does not describe a cluster:", problems)) from error


def simulated(evidence: Evidence, found: Mapping[str, Number]) -> dict[str, str]:
    """A day under the bundle's autoscaler, as files: what it came to, and the picture."""
    told = autoscaling.compare(found, evidence.metrics.get("p95_latency_ms"), evidence.hourly)
    drawn = standalone(autoscaling.picture(told))
    return {
        "autoscaling/simulation.json": json.dumps(told, indent=1) + "\n",
        "autoscaling/simulation.svg": drawn + "\n",
    }


def _hourly(found: Glance) -> Sequence[float] | None:
    """Requests a second in each hour of the day that the release's prices were given for."""
    raw = found.files.get(f"{EVIDENCE}/cost.json")
    day = json.loads(raw).get("day") if raw else None
    return day["requests_per_second"] if day else None


def _document(found: Glance, name: str) -> dict[str, Any]:
    if name not in found.files:
        raise PlanError(f"{found.manifest.name} has no {name}: release it again")
    document = json.loads(found.files[name])
    if not isinstance(document, dict):
        raise PlanError(f"{name} of {found.manifest.name} is no JSON object")
    return document
