"""The alerts of a bundle, each with a made series on which it must fire, and one healthy day on which none may.

Series are written in promtool's notation (``0+10x20``: from 0 in steps of 10, twenty times), a value a minute.
Errors burn a budget: the alert on many windows (Google, The Site Reliability Workbook, chapter 5; what Sloth
generates) fires fast on a fast burn and is not fooled by a short one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from containers.kubernetes.numbers import Number

_BUCKETS = ("0.005", "0.1", "0.5", "1", "2.5", "5", "10", "30", "60", "300", "+Inf")


@dataclass(frozen=True)
class Alert:
    """One alert: when it fires, for how long first, how bad that is, what to do, and where its threshold comes from.

    ``firing`` replaces the healthy series of the same name (or adds one) so that it fires at ``at`` minutes.
    """

    name: str
    expr: str
    wait: str
    severity: str
    summary: str
    why: str
    firing: Mapping[str, str]
    at: int = 30
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Recording:
    """A recorded series that the autoscaler reads, by pod."""

    record: str
    expr: str
    why: str


def recordings(name: str) -> Sequence[Recording]:
    """What the autoscaler scales on, of each pod."""
    engine = f'{{job="{name}-engine"}}'
    used, free = f'DCGM_FI_DEV_FB_USED{{pod=~"{name}-engine-.*"}}', f'DCGM_FI_DEV_FB_FREE{{pod=~"{name}-engine-.*"}}'
    return [
        Recording(
            "slipway:requests_waiting",
            f"sum by (namespace, pod) (vllm:num_requests_waiting{engine})",
            "requests that vLLM has taken and can't run yet",
        ),
        Recording(
            "slipway:requests_outstanding",
            f"sum by (namespace, pod) (vllm:num_requests_waiting{engine} + vllm:num_requests_running{engine})",
            "all that a replica has under way: what its capacity is measured in",
        ),
        Recording(
            "slipway:kv_cache_used",
            f"max by (namespace, pod) (vllm:kv_cache_usage_perc{engine})",
            "the share of the KV cache in use",
        ),
        Recording(
            "slipway:gpu_memory_used",
            f"max by (namespace, pod) ({used} / ({used} + {free}))",
            "flat by design: vLLM takes its share of the GPU when it starts and keeps it",
        ),
    ]


def alerts(name: str, numbers: Mapping[str, Number]) -> Sequence[Alert]:
    """Every alert of the release line ``name``."""
    return [*_of_requests(name, numbers), *_of_the_engine(name, numbers), *_of_replicas(name, numbers)]


def healthy(name: str, numbers: Mapping[str, Number]) -> dict[str, str]:
    """The series of two replicas that are well, for an hour and a half."""
    gateway, share = f'job="{name}-gateway"', float(numbers["gpu_memory_share"].value)
    memory = float(numbers["memory_peak_share"].value)
    fast = str(_fast(numbers))
    series = {
        f'slipway_gateway_request_seconds_bucket{{{gateway},model="m",le="{bound}"}}': (
            "0+60x90" if bound == "+Inf" or float(bound) >= float(fast) else "0+0x90"
        )
        for bound in _BUCKETS
    }
    series |= {
        f'slipway_gateway_requests_total{{{gateway},model="m",status="200"}}': "0+6000x90",
        f'slipway_gateway_requests_total{{{gateway},model="m",status="503"}}': "0+0x90",
        f'slipway_gateway_queue_length{{{gateway},model="m"}}': "0x90",
        f'slipway_release_marked{{release="{name}"}}': "0x90",
        f"kube_deployment_spec_replicas{{{_deployment(name)}}}": "2x90",
        f"kube_deployment_status_replicas_available{{{_deployment(name)}}}": "2x90",
    }
    for pod in ("a", "b"):
        of = f'namespace="slipway",pod="{name}-engine-{pod}"'
        series |= {
            f'slipway_gateway_replica_up{{{gateway},replica="{pod}"}}': "1x90",
            f'vllm:kv_cache_usage_perc{{job="{name}-engine",{of}}}': "0.3x90",
            f'vllm:num_requests_waiting{{job="{name}-engine",{of}}}': "1x90",
            f'vllm:num_requests_running{{job="{name}-engine",{of}}}': "3x90",
            f"DCGM_FI_DEV_FB_USED{{{of}}}": f"{1000 * share:g}x90",
            f"DCGM_FI_DEV_FB_FREE{{{of}}}": f"{1000 * (1 - share):g}x90",
            f"DCGM_FI_DEV_XID_ERRORS{{{of}}}": "0x90",
            f'container_memory_working_set_bytes{{container="engine",{of}}}': f"{1000 * memory:g}x90",
            f'kube_pod_container_resource_limits{{container="engine",resource="memory",{of}}}': "1000x90",
        }
    return series


def _of_requests(name: str, numbers: Mapping[str, Number]) -> list[Alert]:
    gateway = f'job="{name}-gateway"'
    p95, queue = numbers["p95_seconds"], numbers["queue_alert"]
    buckets = f"slipway_gateway_request_seconds_bucket{{{gateway}}}"
    slow = {
        f'slipway_gateway_request_seconds_bucket{{{gateway},model="m",le="{bound}"}}': (
            "0+60x90" if bound == "+Inf" or float(bound) > 2 * float(p95.value) else "0+0x90"
        )
        for bound in _BUCKETS
    }
    failing = {
        f'slipway_gateway_requests_total{{{gateway},model="m",status="200"}}': "0+3000x90",
        f'slipway_gateway_requests_total{{{gateway},model="m",status="503"}}': "0+3000x90",
    }
    few = {f'slipway_gateway_requests_total{{{gateway},model="m",status="503"}}': "0+60x90"}
    return [
        Alert(
            "SlipwayLatencyOverSlo",
            f"histogram_quantile(0.95, sum by (le) (rate({buckets}[5m]))) > {p95}",
            "5m", "page", "p95 of answers is over the service level: look at the queue, then at replicas", p95.why,
            slow,
        ),
        Alert(
            "SlipwayErrorBudgetFastBurn", _burn(gateway, 14.4, numbers, "1h", "5m"), "2m", "page",
            "errors use up a month's budget in two days: look at replicas and their logs",
            numbers["error_budget"].why, failing, at=75,
        ),
        Alert(
            "SlipwayErrorBudgetSlowBurn", _burn(gateway, 6, numbers, "6h", "30m"), "15m", "ticket",
            "errors use up a month's budget in five days", numbers["error_budget"].why, few, at=75,
        ),
        Alert(
            "SlipwayQueueLong", f"sum(slipway_gateway_queue_length{{{gateway}}}) > {queue}", "2m", "page",
            "requests wait for a replica: more are needed, or one is stuck", queue.why,
            {f'slipway_gateway_queue_length{{{gateway},model="m"}}': f"{int(queue.value) + 1}x90"},
        ),
    ]  # fmt: skip


def _of_the_engine(name: str, numbers: Mapping[str, Number]) -> list[Alert]:
    pod = f'namespace="slipway",pod="{name}-engine-a"'
    share = float(numbers["gpu_memory_share"].value)
    over = round(share + (1 - share) / 2, 3)
    memory = float(numbers["memory_peak_share"].value)
    high = round(memory + (1 - memory) / 2, 3)
    working = f'container_memory_working_set_bytes{{container="engine",pod=~"{name}-engine-.*"}}'
    limit = f'kube_pod_container_resource_limits{{container="engine",resource="memory",pod=~"{name}-engine-.*"}}'
    return [
        Alert(
            "SlipwayKvCacheFull", "slipway:kv_cache_used > 0.95", "5m", "page",
            "the KV cache is full: vLLM preempts requests and computes them again", "a choice: vLLM preempts at 1",
            {f'vllm:kv_cache_usage_perc{{job="{name}-engine",{pod}}}': "0.99x90"},
            labels={"namespace": "slipway", "pod": f"{name}-engine-a"},
        ),
        Alert(
            "SlipwayGpuMemoryHeadroom", f"slipway:gpu_memory_used > {over}", "5m", "ticket",
            "the GPU holds more than this release does: something else is on it, or it leaks",
            f"half of what it leaves free: {numbers['gpu_memory_share'].why}",
            {f"DCGM_FI_DEV_FB_USED{{{pod}}}": "999x90", f"DCGM_FI_DEV_FB_FREE{{{pod}}}": "1x90"},
            labels={"namespace": "slipway", "pod": f"{name}-engine-a"},
        ),
        Alert(
            "SlipwayMemoryHeadroom", f"max by (pod) ({working}) / max by (pod) ({limit}) > {high}", "5m", "ticket",
            "a replica's memory nears its limit: it leaks, or requests are longer than the tested ones",
            f"half of what the tested peak left free: {numbers['memory_peak_share'].why}",
            {f'container_memory_working_set_bytes{{container="engine",{pod}}}': "999x90"},
            labels={"pod": f"{name}-engine-a"},
        ),
        Alert(
            "SlipwayXidError", f'max by (pod) (DCGM_FI_DEV_XID_ERRORS{{pod=~"{name}-engine-.*"}}) > 0', "0m", "page",
            "the GPU's driver reports an error: drain the node and look its number up in NVIDIA's XID list",
            "NVIDIA: 0 is no error", {f"DCGM_FI_DEV_XID_ERRORS{{{pod}}}": "0x10 79x80"},
            labels={"pod": f"{name}-engine-a"},
        ),
    ]  # fmt: skip


def _of_replicas(name: str, numbers: Mapping[str, Number]) -> list[Alert]:
    gateway, start = f'job="{name}-gateway"', int(numbers["start_seconds"].value)
    wait = f"{max(1, -(-2 * start // 60))}m"
    deployment, twice = _deployment(name), f"twice the start: {numbers['start_seconds'].why}"
    wanted = f'max by (namespace) (kube_deployment_spec_replicas{{deployment="{name}-engine"}})'
    there = f'max by (namespace) (kube_deployment_status_replicas_available{{deployment="{name}-engine"}})'
    lost = {f'slipway_gateway_replica_up{{{gateway},replica="a"}}': "1x10 0x80"}
    return [
        # The gateway forgets a replica that its Service names no more: only Kubernetes knows how many there should be.
        Alert(
            "SlipwayReplicaLost", f"{there} < {wanted}", wait, "ticket", "a replica is not coming back", twice,
            {f"kube_deployment_status_replicas_available{{{deployment}}}": "2x10 1x80"},
            labels={"namespace": "slipway"},
        ),
        Alert(
            "SlipwayReplicaEjected", f"max by (replica) (slipway_gateway_replica_up{{{gateway}}}) == 0", wait,
            "ticket", "Kubernetes takes a replica for ready and no gateway does: look at its answers", twice, lost,
            labels={"replica": "a"},
        ),
        Alert(
            "SlipwayNoReplica", f"sum(slipway_gateway_replica_up{{{gateway}}}) == 0 or "
            f"absent(slipway_gateway_replica_up{{{gateway}}})", "1m", "page", "nothing answers",
            "no replica is too few", {**lost, f'slipway_gateway_replica_up{{{gateway},replica="b"}}': "1x10 0x80"},
        ),
        Alert(
            "SlipwayChampionMarked", f'max(slipway_release_marked{{release="{name}"}}) > 0', "0m", "page",
            "a rescan found holes in what is deployed: `slipway status`, then release again or roll back",
            "slipway metrics: 1 where the champion's version is marked by `slipway rescan`",
            {f'slipway_release_marked{{release="{name}"}}': "0x10 1x80"},
        ),
    ]  # fmt: skip


def _deployment(name: str) -> str:
    return f'namespace="slipway",deployment="{name}-engine"'


def _burn(gateway: str, factor: float, numbers: Mapping[str, Number], long: str, short: str) -> str:
    """Errors at ``factor`` times the budget, over a long window and still over a short one."""

    def share(window: str) -> str:
        errors = f'sum(rate(slipway_gateway_requests_total{{{gateway},status=~"5.."}}[{window}]))'
        return f"{errors} / sum(rate(slipway_gateway_requests_total{{{gateway}}}[{window}]))"

    bound = f"({factor:g} * {numbers['error_budget']})"
    return f"({share(long)}) > {bound} and ({share(short)}) > {bound}"


def _fast(numbers: Mapping[str, Number]) -> float:
    """The bucket that all of a healthy server's answers are in: well under the service level."""
    return max(float(bound) for bound in _BUCKETS[:-1] if float(bound) <= float(numbers["p95_seconds"].value) / 2)
