"""The numbers of a bundle, each with where it comes from: the manifest, the load test, or a stated choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from containers.kubernetes.names import mebibytes, thousandths

# The API that people have in mind when they state nothing: an answer within half a second.
USUAL_P95_MS = 500.0
# A service level of no errors at all leaves no budget that could burn: one request in a thousand does.
LEAST_ERROR_RATE = 0.001
# Of its measured capacity a replica is run at this share; the rest carries bursts while another starts.
HEADROOM_TARGET = 0.7
LONGEST_GRACE_S = 600
# vLLM's tokens stay within this share of its cache before it begins to preempt, which it does when the cache is full.
KV_TARGET = 0.8
# Of the cores that it was tested with a replica asks for this share: the rest of such a node is for what else must run
# there (the node's own, the gateway), and the replica has what of it is idle.
CPU_SHARE = 0.5
# Kubernetes' own, after which a rollout that gets no further is told.
_PROGRESS_SECONDS = 600
# A node pulls and unpacks an image at so many bytes a second, on a slow day.
_PULL_RATE = 20e6
# The time that a token takes, and what it was called before.
_TOKEN_METRICS = ("p99_tpot_ms", "p99_inter_token_ms")
# What the gateway sends a replica at a time where it is told nothing.
_PARALLEL = 64


@dataclass(frozen=True)
class Number:
    """A number as it is written, and why it is that one."""

    value: Any
    why: str

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Evidence:
    """What a bundle is made from: a release's manifest and load test, as JSON, and the load test's requests.

    ``context`` is the model's longest context in tokens, ``hourly`` the requests a second in each hour of the day that
    the release's ``cost.json`` plans for, if any; ``version`` the registry's.
    """

    manifest: Mapping[str, Any]
    manifest_digest: str
    version: str
    load: Mapping[str, Any]
    requests: Sequence[Mapping[str, Any]]
    context: int
    hourly: Sequence[float] | None = None

    @property
    def metrics(self) -> Mapping[str, float]:
        """What the load test measured."""
        return dict(self.load.get("metrics", {}))

    @property
    def limits(self) -> Mapping[str, float]:
        """What the load gate held it to."""
        found = [gate["verdict"]["limits"] for gate in self.manifest["gates"] if gate["verdict"]["gate"] == "load"]
        return dict(found[0]) if found else {}

    @property
    def on_gpu(self) -> bool:
        """Whether what serves it needs a GPU."""
        return self.manifest["image"]["minimum_driver"] is not None

    @property
    def searched(self) -> bool:
        """Whether the load test looked for the capacity; else its traffic says what was asked, not what is possible."""
        return bool((self.load.get("capacity") or {}).get("requests_per_second"))

    @property
    def good(self) -> list[Mapping[str, Any]]:
        """The requests that were answered."""
        return [row for row in self.requests if row.get("error") is None and row.get("latency_ms") is not None]


def numbers(evidence: Evidence) -> dict[str, Number]:
    """Return every number of the bundle by its name in the templates."""
    capacity, in_flight = _capacity(evidence)
    found = {"capacity": capacity, "in_flight": in_flight}
    found |= _resources(evidence)
    found |= _timings(evidence)
    found |= _service_level(evidence)
    found |= _scaling(evidence, capacity.value, in_flight.value, found["start_seconds"].value)
    found |= _gateway(found, known=evidence.searched)
    return found


def progress_seconds(evidence: Evidence, image_bytes: int | None) -> Number:
    """How long a new replica may take before its rollout counts as stuck; ``image_bytes`` are uncompressed."""
    start = 3 * float(evidence.load["server"]["start_seconds"])
    if not image_bytes:
        return Number(_PROGRESS_SECONDS, "Kubernetes' own: image.json has no size_bytes")
    return Number(
        max(_PROGRESS_SECONDS, math.ceil(image_bytes / _PULL_RATE + start)),
        f"image.json: {image_bytes / 1e9:.1f} GB at {_PULL_RATE / 1e6:.0f} MB/s, a choice, and three starts of "
        f"{start / 3:.1f} s (load.json); at least Kubernetes' own {_PROGRESS_SECONDS}",
    )


def _capacity(evidence: Evidence) -> tuple[Number, Number]:
    """Requests a second that one replica carries, and how many are under way then: rate times mean latency (Little)."""
    search = evidence.load.get("capacity") or {}
    mean = _mean([row["latency_ms"] for row in evidence.good]) / 1000
    if search.get("requests_per_second"):
        rate = float(search["requests_per_second"])
        steps = [step for step in search.get("steps", ()) if step["rate"] == rate]
        mean = next((step["metrics"]["mean_latency_ms"] / 1000 for step in steps if step.get("metrics")), mean)
        why = "load.json: capacity.requests_per_second, the highest rate at which the service level held"
    else:
        rate = float(evidence.metrics.get("requests_per_second", 0.0)) or 1.0
        why = (
            "load.json: metrics.requests_per_second; the capacity was not searched for, so this is what was asked of it"
        )
    under_way = max(1.0, rate * mean)
    return (
        Number(round(rate, 3), why),
        Number(
            round(under_way, 2), f"Little's law: {rate:.3g} requests/s at {1000 * mean:.0f} ms in the mean (load.json)"
        ),
    )


def _resources(evidence: Evidence) -> dict[str, Number]:
    limit = int(evidence.load["memory"]["limit_bytes"])
    peak = int(evidence.metrics.get("peak_memory_bytes") or limit)
    gpu_peak = evidence.load["memory"].get("peak", {}).get("gpu_memory_bytes")
    accelerators = evidence.manifest["hardware"]["accelerators"]
    whole = accelerators[0]["memory_bytes"] if accelerators else None
    share = gpu_peak / whole if gpu_peak and whole else 0.92
    told = "load.json: memory.peak.gpu_memory_bytes over the GPU's memory (manifest: hardware)"
    whole_gpu = f"{told}" if gpu_peak else "vLLM's own default: 0.92 of a GPU, taken up front"
    tested = f"load.json: memory.limit_bytes, the limit that it was tested in; its peak was {peak / 2**20:.0f}Mi"
    cores, told_cores = tested_cores(evidence)
    return {
        "memory_limit": Number(mebibytes(limit / 2**20), tested),
        "memory_peak_share": Number(round(peak / limit, 3), f"load.json: a peak of {peak} bytes, a limit of {limit}"),
        "cpus": Number(thousandths(1000 * cores), told_cores),
        "cpu_request": Number(
            thousandths(max(1, 1000 * CPU_SHARE * cores)),
            f"{CPU_SHARE:.0%} of the {cores:g} cores of the tests ({told_cores}): a node never has all of its own "
            "free, and what is idle is used beyond the request",
        ),
        "gpus": Number(
            int(evidence.on_gpu),
            "load.json: it was tested on one GPU"
            if evidence.on_gpu
            else "manifest: image.minimum_driver: it needs none",
        ),
        "gpu_memory_share": Number(round(share, 3), whole_gpu),
    }


def tested_cores(evidence: Evidence) -> tuple[float, str]:
    """How many cores it was tested with, and what says so."""
    server = evidence.load.get("server", {})
    given = (server.get("computed_on") or {}).get("cores")
    cores = server.get("cpus") or (len(given) if given else None)
    if cores:
        return float(cores), "load.json: server.cpus or the cores it was given, what it was tested with"
    return float(evidence.manifest["hardware"]["cores"]), "manifest: hardware.cores, the machine of the tests"


def _timings(evidence: Evidence) -> dict[str, Number]:
    start = float(evidence.load["server"]["start_seconds"] or 60.0)
    longest = max((row["latency_ms"] for row in evidence.good), default=0.0) / 1000
    metric, token = _token_seconds(evidence)
    whole = evidence.context * token
    grace = min(LONGEST_GRACE_S, math.ceil(max(longest, whole)) + 10)
    return {
        "start_seconds": Number(math.ceil(start), f"load.json: server.start_seconds {start:.1f}, rounded up"),
        "start_failures": Number(
            math.ceil(3 * start / 5),
            f"three times the {start:.1f} s that it took to start (load.json), in periods of 5 s",
        ),
        "grace_seconds": Number(
            grace,
            f"the longest answer: {evidence.context} tokens at {1000 * token:.2f} ms ({metric}), "
            f"the longest measured {longest:.2f} s; 10 s on top, at most {LONGEST_GRACE_S}",
        ),
        "drain_seconds": Number(5, "a choice: endpoints are told of a pod's end within a few seconds"),
    }


def _token_seconds(evidence: Evidence) -> tuple[str, float]:
    """Seconds that a token takes at the most, and which measurement says so: of the metric, or of the requests."""
    for name in _TOKEN_METRICS:
        if evidence.metrics.get(name):
            return f"load.json: {name}", float(evidence.metrics[name]) / 1000
    measured = [row["latency_ms"] / row["output_tokens"] for row in evidence.good if row.get("output_tokens")]
    return "requests.jsonl: the slowest request's latency a token", max(measured, default=0.0) / 1000


def _service_level(evidence: Evidence) -> dict[str, Number]:
    limits = evidence.limits
    p95, errors = limits.get("p95_latency_ms"), float(limits.get("error_rate", 0.0))
    held = "manifest: gates.load.limits.p95_latency_ms, what the release was held to"
    measured = evidence.metrics.get("p95_latency_ms")
    beside = f"; measured {measured:.0f} ms" if measured else ""
    budget = max(errors, LEAST_ERROR_RATE)
    return {
        "p95_seconds": Number(
            (p95 or USUAL_P95_MS) / 1000,
            (held if p95 else f"the usual {USUAL_P95_MS:.0f} ms: the model's file names none") + beside,
        ),
        "error_budget": Number(
            budget,
            "manifest: gates.load.limits.error_rate"
            if errors >= LEAST_ERROR_RATE
            else f"the release allows {errors:g} (manifest: gates.load.limits.error_rate): no budget can't burn",
        ),
    }


def _scaling(evidence: Evidence, rate: float, under_way: float, start: int) -> dict[str, Number]:
    peak = max(evidence.hourly) if evidence.hourly else None
    most = 10 if peak is None else max(2, math.ceil(1.5 * peak / (HEADROOM_TARGET * rate)))
    kv_peak = evidence.metrics.get("kv_cache_used_peak")
    told = f"load.json: metrics.kv_cache_used_peak, at most {kv_peak or 0:.1%} was used in the load test"
    seen = told if kv_peak is not None else "its use was not measured"
    target = HEADROOM_TARGET * under_way
    return {
        "replicas": Number(2, "a choice: one may be lost, or replaced, while the other answers"),
        "most_replicas": Number(
            most,
            "a choice: no load of a day is known (`cost.requests_per_day`)"
            if peak is None
            else f"cost.json: {peak:.3g} requests/s in the busiest hour, half as much again, at "
            f"{HEADROOM_TARGET:.0%} of {rate:.3g} a replica",
        ),
        "outstanding_target": Number(
            thousandths(max(1, 1000 * target)),
            f"{HEADROOM_TARGET:.0%} of the {under_way:.3g} requests that are under way at a replica's capacity",
        ),
        "waiting_target": Number(
            thousandths(max(1, 1000 * (1 - HEADROOM_TARGET) * under_way)),
            f"the other {1 - HEADROOM_TARGET:.0%} of {under_way:.3g}: who waits beyond that waits past the capacity",
        ),
        "kv_target": Number(
            thousandths(1000 * KV_TARGET), f"a choice: vLLM preempts requests when its cache is full; {seen}"
        ),
        "scale_up_seconds": Number(
            max(15, start),
            f"a replica starts in {start} s (load.json): no second doubling before the first one answers",
        ),
        "scale_down_seconds": Number(
            max(300, 10 * start),
            f"ten starts of {start} s, at least Kubernetes' own 300 s: what is given up costs a start",
        ),
    }


def _gateway(found: Mapping[str, Number], *, known: bool) -> dict[str, Number]:
    rate, under_way = float(found["capacity"].value), float(found["in_flight"].value)
    wait = 10
    capacity = f"as many as are under way at a replica's capacity: {under_way:.3g}"
    unknown = "the gateway's own: the capacity was not searched for, so vLLM's queue takes what it takes"
    two = f"what two replicas of {rate:.3g} requests/s answer in the {wait} s that one waits"
    return {
        "parallel": Number(max(1, math.ceil(under_way)), capacity) if known else Number(_PARALLEL, unknown),
        "queue_size": Number(max(8, math.ceil(rate * wait * 2)), two),
        "queue_timeout": Number(wait, "a choice: who has waited so long has mostly gone"),
        "queue_alert": Number(
            max(1, math.ceil(2 * rate)), f"what one replica of {rate:.3g} requests/s answers in two seconds (load.json)"
        ),
        "request_timeout": Number(found["grace_seconds"].value, f"as the grace period: {found['grace_seconds'].why}"),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 1000.0
