"""The numbers of a bundle, each with its source: the manifest, the load test, or a stated choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from containers.kubernetes.names import mebibytes, thousandths
from registry.manifest import Manifest, ServedConfiguration

# The service level of a release whose model's file states none: an answer within half a second.
USUAL_P95_MS = 500.0
# A service level of no errors at all leaves no error budget: one request in a thousand does.
LEAST_ERROR_RATE = 0.001
# A replica runs at this share of its measured capacity; the rest carries bursts while another replica starts.
HEADROOM_TARGET = 0.7
LONGEST_GRACE_S = 600
# Another replica starts when this share of vLLM's cache is in use: when it is full, vLLM preempts requests.
KV_TARGET = 0.8
# A replica requests this share of the cores that it was tested with: the rest of such a node is for what else must run
# there (the node's own processes, the gateway). The replica uses the idle part of it too.
CPU_SHARE = 0.5
# Kubernetes' default, after which a rollout without progress is reported.
_PROGRESS_SECONDS = 600
# The start of a server whose load test states none.
_START_SECONDS = 60.0
# A slow node pulls and unpacks an image at this rate, in bytes a second.
_PULL_RATE = 20e6
_TPOT = "p99_tpot_ms"
# Requests that the gateway sends a replica at a time by default.
_PARALLEL = 64


@dataclass(frozen=True)
class Number:
    """A number as it is written, and why it is that one."""

    value: Any
    why: str

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class AnsweredRequest:
    """One request of the load test that was answered."""

    latency_ms: float
    output_tokens: int | None


@dataclass(frozen=True)
class ReplicaMeasurements:
    """What the load test measured on one replica; ``metrics`` by their names in ``load.json``.

    ``start_seconds`` is None if the server never became healthy. ``cores`` is how many it was tested with, if that is
    known. ``capacity`` is in requests a second, and None if it was not searched for; ``capacity_latency_ms`` is the
    mean latency at that rate. ``ranks`` is how many processes the model was divided among, each on one of ``gpus`` or
    on cores of its own, with ``shared_memory_bytes`` for all; ``gpu_memory_share`` is the peak of the fullest GPU as a
    share of its memory.
    """

    metrics: Mapping[str, float]
    start_seconds: float | None
    memory_limit_bytes: int
    ranks: int = 1
    shared_memory_bytes: int = 2**30
    gpus: int = 0
    gpu_memory_share: float | None = None
    cores: float | None = None
    capacity: float | None = None
    capacity_latency_ms: float | None = None
    requests: Sequence[AnsweredRequest] = ()


@dataclass(frozen=True)
class BundleEvidence:
    """What a bundle is made from: a release's manifest, and what its load test measured.

    ``context`` is the model's longest context in tokens; ``hourly`` the requests a second in each hour of the day that
    the release's ``cost.json`` plans for, if any; ``version`` the registry's. ``variant`` is the serving variant that
    was measured; None is the main configuration.
    """

    manifest: Manifest
    version: str
    measured: ReplicaMeasurements
    context: int
    hourly: Sequence[float] | None = None
    variant: ServedConfiguration | None = None

    @property
    def serving(self) -> ServedConfiguration | None:
        """What is served: the variant, or the main configuration; the first releases do not list theirs."""
        return self.variant or next(iter(self.manifest.serving), None)

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of the load test."""
        return self.measured.metrics

    @property
    def limits(self) -> Mapping[str, float]:
        """The limits of the load gate."""
        return next((gate.verdict.limits for gate in self.manifest.gates if gate.verdict.gate == "load"), {})

    @property
    def on_gpu(self) -> bool:
        """Whether the image needs a GPU."""
        return self.manifest.image.minimum_driver is not None

    @property
    def searched(self) -> bool:
        """Whether the load test searched for the capacity; otherwise its rate is the one that was sent."""
        return bool(self.measured.capacity)


def numbers(evidence: BundleEvidence) -> dict[str, Number]:
    """Return every number of the bundle by its name in the templates."""
    capacity, in_flight = _capacity(evidence)
    found = {"capacity": capacity, "in_flight": in_flight}
    found |= _resources(evidence)
    found |= _timings(evidence)
    found |= _service_level(evidence)
    found |= _scaling(evidence, capacity.value, in_flight.value, found["start_seconds"].value)
    found |= _gateway(found, known=evidence.searched)
    return found


def progress_seconds(evidence: BundleEvidence, image_bytes: int) -> Number:
    """How long a new replica may take before its rollout counts as stuck; ``image_bytes`` are uncompressed."""
    start = 3 * _start_seconds(evidence)
    return Number(
        max(_PROGRESS_SECONDS, math.ceil(image_bytes / _PULL_RATE + start)),
        f"image.json: {image_bytes / 1e9:.1f} GB at {_PULL_RATE / 1e6:.0f} MB/s, a choice, and three starts of "
        f"{start / 3:.1f} s (load.json); at least Kubernetes' default of {_PROGRESS_SECONDS}",
    )


def _start_seconds(evidence: BundleEvidence) -> float:
    return evidence.measured.start_seconds or _START_SECONDS


def _capacity(evidence: BundleEvidence) -> tuple[Number, Number]:
    """Requests a second that one replica carries, and how many are in flight then: rate times mean latency (Little)."""
    measured = evidence.measured
    mean_ms = _mean([request.latency_ms for request in measured.requests])
    if measured.capacity:
        rate, mean_ms = measured.capacity, measured.capacity_latency_ms or mean_ms
        why = "load.json: capacity.requests_per_second, the highest rate at which the service level held"
    else:
        rate = measured.metrics.get("requests_per_second") or 1.0
        why = "load.json: metrics.requests_per_second, the rate that was sent; the capacity was not searched for"
    in_flight = max(1.0, rate * mean_ms / 1000)
    return (
        Number(round(rate, 3), why),
        Number(
            round(in_flight, 2),
            f"Little's law: {rate:.3g} requests/s at a mean latency of {mean_ms:.0f} ms (load.json)",
        ),
    )


def _resources(evidence: BundleEvidence) -> dict[str, Number]:
    limit = evidence.measured.memory_limit_bytes
    peak = int(evidence.metrics.get("peak_memory_bytes") or limit)
    measured = evidence.measured
    ranks, share = measured.ranks, measured.gpu_memory_share
    gpu_why = (
        "load.json: memory.gpus, the peak of the fullest over its memory"
        if share
        else "vLLM's default: 0.92 of a GPU, taken at the start"
    )
    of_ranks = f", for {ranks} ranks (load.json: server.ranks)" if ranks > 1 else ""
    tested = f"load.json: memory.limit_bytes, the limit in the load test; the peak was {peak / 2**20:.0f}Mi"
    cores, cores_why = tested_cores(evidence)
    return {
        "memory_limit": Number(mebibytes(limit / 2**20), tested),
        "memory_peak_share": Number(round(peak / limit, 3), f"load.json: a peak of {peak} bytes, a limit of {limit}"),
        "cpus": Number(thousandths(1000 * cores), cores_why),
        "cpu_request": Number(
            thousandths(max(1, 1000 * CPU_SHARE * cores)),
            f"{CPU_SHARE:.0%} of the {cores:g} cores of the load test ({cores_why}): a node never has all its cores "
            "free, and the replica may use idle ones beyond its request",
        ),
        "gpus": Number(
            max(1, measured.gpus) if evidence.on_gpu else 0,
            "load.json: server.gpus, those of the server in the load test"
            if evidence.on_gpu
            else "manifest: image.minimum_driver: the image needs no GPU",
        ),
        "gpu_memory_share": Number(round(share or 0.92, 3), gpu_why),
        "shared_memory": Number(
            mebibytes(measured.shared_memory_bytes / 2**20), f"the sandbox's --shm-size in the load test{of_ranks}"
        ),
        "rank_threads": Number(max(1, math.floor(cores / ranks)), f"{cores:g} cores{of_ranks}, rounded down"),
    }


def tested_cores(evidence: BundleEvidence) -> tuple[float, str]:
    """How many cores the server had in the load test, and the source of that number."""
    if evidence.measured.cores:
        return evidence.measured.cores, "load.json: server.cpus, or the number of server.computed_on.cores"
    return float(evidence.manifest.hardware.cores), "manifest: hardware.cores, of the machine of the tests"


def _timings(evidence: BundleEvidence) -> dict[str, Number]:
    start, ranks = _start_seconds(evidence), evidence.measured.ranks
    of_ranks = f" of {ranks} ranks" if ranks > 1 else ""
    longest = max((request.latency_ms for request in evidence.measured.requests), default=0.0) / 1000
    metric, token = _token_seconds(evidence)
    whole = evidence.context * token
    grace = min(LONGEST_GRACE_S, math.ceil(max(longest, whole)) + 10)
    return {
        "start_seconds": Number(math.ceil(start), f"load.json: server.start_seconds {start:.1f}, rounded up"),
        "start_failures": Number(
            math.ceil(3 * start / 5),
            f"three times the {start:.1f} s of a start{of_ranks} (load.json), in periods of 5 s",
        ),
        "grace_seconds": Number(
            grace,
            f"the longest answer: {evidence.context} tokens at {1000 * token:.2f} ms ({metric}), "
            f"the longest measured {longest:.2f} s; 10 s on top, at most {LONGEST_GRACE_S}",
        ),
        "drain_seconds": Number(5, "a choice: endpoints learn of a pod's end within a few seconds"),
    }


def _token_seconds(evidence: BundleEvidence) -> tuple[str, float]:
    """The longest time of a token in seconds, and its source: the metric, or else the slowest request."""
    found = evidence.metrics.get(_TPOT)
    if found:
        return f"load.json: {_TPOT}", found / 1000
    measured = [each.latency_ms / each.output_tokens for each in evidence.measured.requests if each.output_tokens]
    return "requests.jsonl: the slowest request's latency per token", max(measured, default=0.0) / 1000


def _service_level(evidence: BundleEvidence) -> dict[str, Number]:
    limits = evidence.limits
    p95, errors = limits.get("p95_latency_ms"), float(limits.get("error_rate", 0.0))
    held = "manifest: gates.load.limits.p95_latency_ms, the limit of the release"
    measured = evidence.metrics.get("p95_latency_ms")
    beside = f"; measured {measured:.0f} ms" if measured else ""
    budget = max(errors, LEAST_ERROR_RATE)
    return {
        "p95_seconds": Number(
            (p95 or USUAL_P95_MS) / 1000,
            (held if p95 else f"the default of {USUAL_P95_MS:.0f} ms: the model's file states no limit") + beside,
        ),
        "error_budget": Number(
            budget,
            "manifest: gates.load.limits.error_rate"
            if errors >= LEAST_ERROR_RATE
            else f"a choice: the release allows only {errors:g} (manifest: gates.load.limits.error_rate)",
        ),
    }


def _scaling(evidence: BundleEvidence, rate: float, in_flight: float, start: int) -> dict[str, Number]:
    peak = max(evidence.hourly) if evidence.hourly else None
    most = 10 if peak is None else max(2, math.ceil(1.5 * peak / (HEADROOM_TARGET * rate)))
    kv_peak = evidence.metrics.get("kv_cache_used_peak")
    seen = (
        "its use was not measured"
        if kv_peak is None
        else f"load.json: metrics.kv_cache_used_peak, at most {kv_peak:.1%} was used in the load test"
    )
    target = HEADROOM_TARGET * in_flight
    return {
        "replicas": Number(2, "a choice: one may be lost or replaced while the other answers"),
        "most_replicas": Number(
            most,
            "a choice: the model's file has no `cost.requests_per_day`"
            if peak is None
            else f"cost.json: {peak:.3g} requests/s in the busiest hour, half as much again, at "
            f"{HEADROOM_TARGET:.0%} of {rate:.3g} a replica",
        ),
        "outstanding_target": Number(
            thousandths(max(1, 1000 * target)),
            f"{HEADROOM_TARGET:.0%} of the {in_flight:.3g} requests in flight at a replica's capacity",
        ),
        "waiting_target": Number(
            thousandths(max(1, 1000 * (1 - HEADROOM_TARGET) * in_flight)),
            f"the other {1 - HEADROOM_TARGET:.0%} of {in_flight:.3g}: waiting requests beyond that exceed the capacity",
        ),
        "kv_target": Number(
            thousandths(1000 * KV_TARGET), f"a choice: vLLM preempts requests when its cache is full; {seen}"
        ),
        "scale_up_seconds": Number(
            max(15, start),
            f"a replica starts in {start} s (load.json): no second doubling before the first new replica answers",
        ),
        "scale_down_seconds": Number(
            max(300, 10 * start),
            f"ten starts of {start} s, at least Kubernetes' default of 300 s: a replica that is removed costs a start",
        ),
    }


def _gateway(found: Mapping[str, Number], *, known: bool) -> dict[str, Number]:
    rate, in_flight = float(found["capacity"].value), float(found["in_flight"].value)
    wait = 10
    capacity = f"as many as are in flight at a replica's capacity: {in_flight:.3g}"
    unknown = "the gateway's default: the capacity was not searched for, and vLLM queues what it can't serve"
    two = f"what two replicas of {rate:.3g} requests/s answer in the {wait} s that a request waits"
    return {
        "parallel": Number(max(1, math.ceil(in_flight)), capacity) if known else Number(_PARALLEL, unknown),
        "queue_size": Number(max(8, math.ceil(rate * wait * 2)), two),
        "queue_timeout": Number(wait, "a choice: most clients give up after that time"),
        "queue_alert": Number(
            max(1, math.ceil(2 * rate)), f"what one replica of {rate:.3g} requests/s answers in two seconds (load.json)"
        ),
        "request_timeout": Number(found["grace_seconds"].value, f"the grace period: {found['grace_seconds'].why}"),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 1000.0
