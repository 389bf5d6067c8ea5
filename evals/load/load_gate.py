"""The load gate: compares evidence with the plan's limits. A pure function: a changed limit needs no new load test."""

from __future__ import annotations

from collections.abc import Mapping

from evals.load.evidence import LoadEvidence
from evals.load.measurements import gpu_metric
from evals.load.plan import LoadPlan
from evals.load.slo import met, plain, sentence
from registry.verdict import Verdict

GATE = "load"
# Docker's own figures come about once a second; a busy machine may miss some of them.
MOST_UNWATCHED_SECONDS = 10.0


def judge(evidence: LoadEvidence, plan: LoadPlan) -> Verdict:
    """Compare the evidence of a load test with the plan's limits, unrounded; a metric that is missing fails.

    A server that never became healthy, a setting that its engine did not apply, a failed canary, a dead server, answers
    that speculation changed, a fault that it did not survive, a leak or a missed limit fails. Traffic other than
    requested (a late client, requests that were not sent), a search for the capacity that the client ended, memory that
    was not sampled, and a missing GPU are inconclusive, unless something failed that they can't explain. So is a
    configuration that this device does not support (``unsupported``), which can't be accepted.
    """
    limits = {**plan.limits(), **_gpu_limits(evidence, plan)}
    metrics = dict(evidence.metrics)
    lacking = evidence.lacking
    if lacking is not None:
        return _inconclusive("unsupported" if evidence.unsupported else "no-gpu", lacking, plan, metrics, limits)
    failures = _outright(evidence)
    doubt = None if failures else _doubt(evidence, plan)
    if not failures:
        missed = [name for name in limits if not met(name, metrics, limits)]
        explained = {name for name in missed if doubt and _explains(doubt[0], name, evidence, limits)}
        failures = [_failure(name, metrics, limits, evidence) for name in missed if name not in explained]
    if failures:
        return Verdict(gate=GATE, status="fail", reason="; ".join(failures), metrics=metrics, limits=limits)
    if doubt is not None:
        return _inconclusive(*doubt, plan, metrics, limits)
    sent = ", ".join(
        f"{each.traffic.requests} requests at {profile.rate:g}/s"
        + (f" ({profile.name})" if len(plan.traffic) > 1 else "")
        for each, profile in zip(evidence.profiles, plan.traffic, strict=True)
    )
    reason = f"{sent}: " + ", ".join(sentence(name, metrics, limits) for name in limits)
    return Verdict(gate=GATE, status="pass", reason=reason, metrics=metrics, limits=limits)


def _gpu_limits(evidence: LoadEvidence, plan: LoadPlan) -> dict[str, float]:
    """The limit of each GPU's memory, by the name of the metric."""
    share = 1 - plan.memory.gpu_headroom
    return {gpu_metric(number): share * gpu.total_bytes for number, gpu in enumerate(evidence.memory.gpus)}


def is_conclusive(evidence: LoadEvidence, plan: LoadPlan) -> bool:
    """Say whether the evidence can be reused: the traffic was as requested, and the server lived to its end.

    The next run measures again what is not conclusive.
    """
    if evidence.lacking or evidence.server.died is not None or evidence.canary.error is not None:
        return False
    return _doubt(evidence, plan) is None


def _inconclusive(
    cause: str, reason: str, plan: LoadPlan, metrics: Mapping[str, float], limits: Mapping[str, float]
) -> Verdict:
    verdict = Verdict(gate=GATE, status="inconclusive", cause=cause, reason=reason, metrics=metrics, limits=limits)
    return verdict.accepting({str(each): why for each, why in plan.accept_inconclusive.items()})


def _explains(cause: str, name: str, evidence: LoadEvidence, limits: Mapping[str, float]) -> bool:
    """Whether a doubt may be why a limit was missed.

    A late client lengthens latencies, and the time that throughput is counted over. A request that was never sent
    counts as an error; one that was sent and failed is the server's error.
    """
    metric = plain(name)
    if metric == "capacity_requests_per_second":
        return _capacity_doubt(evidence, limits) is not None
    if cause == "memory-unwatched":
        of_memory = metric in {"peak_memory_bytes", "leak_bytes_per_request"} or metric.startswith("gpu_")
        return of_memory and name not in evidence.metrics
    if metric == "error_rate":
        return cause == "incomplete" and all(
            each.traffic.sent - each.traffic.answered <= limits[name] * each.traffic.requests
            for each in evidence.profiles
        )
    return metric.endswith(("latency_ms", "ttft_ms")) or metric in {"output_tokens_per_second", "requests_per_second"}


def _outright(evidence: LoadEvidence) -> list[str]:
    """Failures that do not depend on the limits."""
    server, canary = evidence.server, evidence.canary
    if server.start_seconds is None:
        return [f"the server never became healthy: {server.died}"]
    if server.died is not None:
        return [f"during the load test the server {server.died}"]
    if server.not_applied:
        return [f"the engine did not apply what was requested: {each}" for each in server.not_applied]
    if canary.ok:
        changed = evidence.speculation.wrong if evidence.speculation is not None else None
        return [f"speculation changes greedy answers: {changed}"] if changed else []
    got = f"answered {canary.answer!r}" if canary.error is None else f"failed ({canary.error})"
    how = "" if canary.margin is None else f", which FP16 prefers by {canary.margin:.2f} nats"
    return [f"canary: the answer to {canary.prompt!r} must begin with {canary.expect!r}{how}, but the server {got}"]


def _failure(name: str, metrics: Mapping[str, float], limits: Mapping[str, float], evidence: LoadEvidence) -> str:
    if name == "faults_failed" and name in metrics:
        failed = [f"{fault.name} ({fault.seen})" for fault in evidence.faults or () if fault.ok is False]
        return f"faults not survived: {', '.join(failed)}"
    if name == "leak_bytes_per_request" and name in metrics:
        return f"memory leaks: at least {sentence(name, metrics, limits).removeprefix(f'{name} ')}"
    on = {gpu_metric(number): f" ({gpu.uuid})" for number, gpu in enumerate(evidence.memory.gpus)}
    return sentence(name, metrics, limits) + on.get(name, "")


def _doubt(evidence: LoadEvidence, plan: LoadPlan) -> tuple[str, str] | None:
    """Say why the traffic was not as requested, as cause and reason."""
    if not evidence.canary.ok:
        return None
    profiles = plan.traffic
    if len(evidence.profiles) != len(profiles):
        return "incomplete", f"{len(evidence.profiles)} of {len(profiles)} profiles were sent: run again"
    for each, profile in zip(evidence.profiles, profiles, strict=True):
        traffic = each.traffic
        wanted = profile.requests
        if traffic.requests != wanted or traffic.sent != wanted or not traffic.is_complete:
            return "incomplete", (
                f"the load generator sent {traffic.sent} of {wanted} requests of `{profile.name}` and "
                f"{'finished' if traffic.is_complete else 'did not finish'}: run again"
            )
        late = traffic.client_late_ms["p95"]
        if late > plan.max_client_late_ms:
            return "client-late", (
                f"the load generator itself was late: {late:.0f} ms at p95 of `{profile.name}`, limit "
                f"{plan.max_client_late_ms:g} ms; run again on a quieter machine"
            )
    unwatched = evidence.memory.unwatched_seconds
    if unwatched > MOST_UNWATCHED_SECONDS:
        return "memory-unwatched", (
            f"the memory was not sampled for {unwatched:.0f} s, limit {MOST_UNWATCHED_SECONDS:g} s: the peak may have "
            "been missed; run again"
        )
    return _capacity_doubt(evidence, plan.limits())


def _capacity_doubt(evidence: LoadEvidence, limits: Mapping[str, float]) -> tuple[str, str] | None:
    """Say why the search for the capacity ended below the required rate without reaching the server's own limit."""
    found, floor = evidence.capacity, limits.get("capacity_requests_per_second")
    if found is None or floor is None or found.conclusive or (found.requests_per_second or 0.0) >= floor:
        return None
    if found.first_failing is not None and found.first_failing <= floor:
        return None
    cause = "client-late" if found.steps[-1].status == "unclear" else "incomplete"
    return cause, f"the search for the capacity ended early: {found.reason}; {floor:g}/s are required"
