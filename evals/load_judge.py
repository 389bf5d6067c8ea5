"""The load gate: evidence against the plan's limits. A pure function, so that a changed limit is judged anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evals.load_plan import LoadPlan
from evals.slo import met, plain, sentence
from registry.verdict import Verdict

GATE = "load"


def judge(evidence: Mapping[str, Any], plan: LoadPlan) -> Verdict:
    """Hold the evidence of `load.measure` against the plan's limits, unrounded; a metric that is missing fails.

    A server that never got healthy, a failed canary, a dead server, a fault that it did not survive, a leak or another
    limit not met is a fail. Traffic that was not the traffic asked for (a client that was late, requests that never
    went out) is inconclusive, unless something failed that it can't explain.
    """
    limits = plan.limits()
    metrics = dict(evidence["metrics"])
    failures = _outright(evidence)
    doubt = None if failures else _doubt(evidence, plan)
    if not failures:
        missed = [name for name in limits if not met(name, metrics, limits)]
        # Lateness of the client lengthens latencies and nothing else.
        explained = {name for name in missed if doubt and plain(name).endswith(("latency_ms", "ttft_ms"))}
        failures = [_failure(name, metrics, limits, evidence) for name in missed if name not in explained]
    if failures:
        return Verdict(gate=GATE, status="fail", reason="; ".join(failures), metrics=metrics, limits=limits)
    if doubt is not None:
        cause, reason = doubt
        verdict = Verdict(gate=GATE, status="inconclusive", cause=cause, reason=reason, metrics=metrics, limits=limits)
        return verdict.accepting({str(cause): why for cause, why in plan.accept_inconclusive.items()})
    sent = ", ".join(
        f"{each['traffic']['requests']} requests at {profile.rate:g}/s"
        + (f" ({profile.name})" if len(plan.traffic) > 1 else "")
        for each, profile in zip(evidence["profiles"], plan.traffic, strict=True)
    )
    reason = f"{sent}: " + ", ".join(sentence(name, metrics, limits) for name in limits)
    return Verdict(gate=GATE, status="pass", reason=reason, metrics=metrics, limits=limits)


def is_conclusive(evidence: Mapping[str, Any], plan: LoadPlan) -> bool:
    """Say whether the evidence is worth keeping: the traffic was as asked for, and the server lived to its end.

    What isn't should be measured again by the next run instead of being judged again.
    """
    if evidence["server"]["died"] is not None or evidence["canary"]["error"] is not None:
        return False
    return _doubt(evidence, plan) is None


def _outright(evidence: Mapping[str, Any]) -> list[str]:
    """What fails whatever the limits are."""
    server, canary = evidence["server"], evidence["canary"]
    if server["start_seconds"] is None:
        return [f"the server never got healthy: {server['died']}"]
    if server["died"] is not None:
        return [f"the server {server['died']} during the load test"]
    if canary["ok"]:
        return []
    said = f"answered {canary['answer']!r}" if canary["error"] is None else f"failed ({canary['error']})"
    return [f"canary: {canary['prompt']!r} must continue with {canary['expect']!r}, the server {said}"]


def _failure(name: str, metrics: Mapping[str, float], limits: Mapping[str, float], evidence: Mapping[str, Any]) -> str:
    if name == "faults_failed" and name in metrics:
        failed = [f"{fault['name']} ({fault['seen']})" for fault in evidence["faults"] if fault["ok"] is False]
        return f"not survived: {', '.join(failed)}"
    if name == "leak_bytes_per_request" and name in metrics:
        return f"memory leaks: at least {sentence(name, metrics, limits).removeprefix(f'{name} ')}"
    return sentence(name, metrics, limits)


def _doubt(evidence: Mapping[str, Any], plan: LoadPlan) -> tuple[str, str] | None:
    """Say why the traffic was not the traffic asked for, as cause and reason."""
    if not evidence["canary"]["ok"]:
        return None
    profiles = plan.traffic
    if len(evidence["profiles"]) != len(profiles):
        return "incomplete", f"{len(evidence['profiles'])} of {len(profiles)} profiles were sent: run again"
    for each, profile in zip(evidence["profiles"], profiles, strict=True):
        traffic = each["traffic"]
        wanted = profile.requests
        if traffic["requests"] != wanted or traffic["sent"] != wanted or not traffic["is_complete"]:
            return "incomplete", (
                f"the load generator sent {traffic['sent']} of {wanted} requests of `{profile.name}` and says "
                f"{'it is done' if traffic['is_complete'] else 'that it did not finish'}: run again"
            )
        late = traffic["client_late_ms"]["p95"]
        if late > plan.max_client_late_ms:
            return "client-late", (
                f"the load generator itself was late: {late:.0f} ms at p95 of `{profile.name}`, limit "
                f"{plan.max_client_late_ms:g} ms; run again on a quieter machine"
            )
    return None
