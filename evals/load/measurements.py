"""What a load test's measurements add up to: metrics by their limits' names, memory, the client's cost, findings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from containers.sandbox.sandbox import Server
from evals.load.expected_memory import Expected, compared
from evals.load.slo import DISTRIBUTIONS, PERCENTILES, percentile
from evals.load.traffic.profile import TrafficProfile
from evals.statistics.trend import slope

_MOST_SAMPLES = 6000
# The slope of the memory begins after this share of the traffic: pools and caches fill first.
_SETTLING_SHARE = 0.2
# A client that takes more than this may take the server's cores.
_COSTLY_CORES = 1.0


def request_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a profile's requests add up to, by the names of the limits; what could not be measured is absent."""
    metrics: dict[str, float] = {}
    if not rows:
        return metrics
    good = [row for row in rows if row["error"] is None]
    metrics["error_rate"] = (len(rows) - len(good)) / len(rows)
    for column in DISTRIBUTIONS:
        values = [row[column] for row in good if row.get(column) is not None]
        if values:
            metrics |= {f"p{share}_{column}": percentile(values, share) for share in PERCENTILES}
    if good:
        seconds = (max(row["due_ms"] + row["latency_ms"] for row in good) - min(row["start_ms"] for row in good)) / 1000
        metrics["output_tokens_per_second"] = sum(row["output_tokens"] or 0 for row in good) / seconds
        metrics["requests_per_second"] = len(good) / seconds
    return metrics


def all_metrics(
    server: Server,
    measured: Sequence[Mapping[str, Any]],
    found: Mapping[str, Any] | None,
    survived: Sequence[Mapping[str, Any]] | None,
) -> dict[str, float]:
    """Everything that a limit can be set for, by name; what could not be measured is absent."""
    metrics: dict[str, float] = {"start_seconds": server.started_seconds}
    peak = server.memory.peak(outside="faults")
    if peak is not None:
        metrics["peak_memory_bytes"] = float(peak)
    for number, each in enumerate(measured):
        prefix = f"{each['name']}." if number else ""
        metrics |= {f"{prefix}{name}": value for name, value in each["metrics"].items()}
    leaks = [each["leak"]["bytes_per_request"][1] for each in measured if each["leak"]]
    if leaks:
        metrics["leak_bytes_per_request"] = max(leaks)
    if found is not None:
        for name in ("requests_per_second", "output_tokens_per_second"):
            # None beside a rate that failed: the level holds at no rate. None alone: the search told nothing.
            if found[name] is not None or found["first_failing"] is not None:
                metrics[f"capacity_{name}"] = found[name] or 0.0
    if survived is not None:
        metrics["faults_failed"] = float(sum(fault["ok"] is False for fault in survived))
    return metrics


def leak(samples: Sequence[Mapping[str, Any]], profile: TrafficProfile) -> dict[str, Any] | None:
    """The slope of the memory under load, a second and a request, each as estimate and 95% interval."""
    loaded = [sample for sample in samples if sample["phase"] == "load" and "memory_bytes" in sample]
    settled = loaded[int(_SETTLING_SHARE * len(loaded)) :]
    try:
        found = slope([each["seconds"] for each in settled], [each["memory_bytes"] for each in settled])
    except ValueError:
        return None
    ends = [found.estimate, found.lower, found.upper]
    rate = profile.requests / profile.seconds
    return {"bytes_per_second": ends, "bytes_per_request": [end / rate for end in ends], "samples": len(settled)}


def memory(
    server: Server, measured: Sequence[Mapping[str, Any]], expected: Expected | None, unwatched: float
) -> dict[str, Any]:
    """The memory's peaks, by phase too, how densely it was sampled, its leaks, and the prediction beside it.

    ``unwatched`` is the longest time without a sample, in seconds, faults left out.
    """
    sampler = server.memory
    names = sorted({name for sample in sampler.samples for name in sample} - {"seconds", "phase"})
    peaks = {name: sampler.peak(name, outside="faults") for name in names}
    return {
        "limit_bytes": server.memory_bytes,
        "source": sampler.source,
        "samples": len(sampler.samples),
        "hertz": sampler.hertz(),
        "unwatched_seconds": unwatched,
        "peak": peaks,
        "phases": sampler.peaks_by_phase(),
        "leaks": {each["name"]: each["leak"] for each in measured if each["leak"]},
        "expected": None if expected is None else compared(expected, peaks),
    }


def client_cost(drives: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the load generator itself cost: all its processor time, and the most cores that it had under way."""
    cores = [each["cores"] for each in drives if each.get("cores") is not None]
    return {
        "cpu_seconds": sum(each.get("cpu_seconds", 0.0) for each in drives),
        "seconds": sum(each.get("seconds", 0.0) for each in drives),
        "cores": max(cores, default=None),
    }


def findings(evidence: Mapping[str, Any]) -> list[str]:
    """What a person should know and no limit is about."""
    found = []
    cores = evidence["client"]["cores"]
    if cores is not None and cores > _COSTLY_CORES:
        found.append(
            f"the load generator itself took {cores:.2f} cores, which the server lacked if the two share a machine"
        )
    if evidence["server"]["computed_on"]["cores_shared"]:
        found.append("the server shared its cores with other servers, which made it slower when they were busy")
    expected = evidence["memory"]["expected"]
    if expected is not None and expected["off"]:
        found.append(expected["sentence"])
    left_out = [fault["name"] for fault in evidence["faults"] or () if fault["ok"] is None]
    if left_out:
        found.append(f"not every fault could be inflicted: {', '.join(left_out)}")
    for each in evidence["profiles"]:
        if each["shortened"]:
            found.append(f"`{each['name']}` was shortened to the model's context: its figures are of shorter requests")
        if each["traffic"].get("warmup_errors"):
            wrong = each["traffic"]["warmup_errors"]
            found.append(f"{len(wrong)} warm-up requests of `{each['name']}` failed: {wrong[0]}")
        if each["queue"] and each["queue"]["growing"]:
            found.append(f"the queue grew all through `{each['name']}`: at that rate the server is saturated")
    return found


def write(
    folder: Path,
    evidence: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
) -> None:
    """Write ``load.json``, ``requests.jsonl`` and ``memory.json``."""
    (folder / "requests.jsonl").write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    (folder / "memory.json").write_text(json.dumps(_thinned(samples), allow_nan=False))
    (folder / "load.json").write_text(json.dumps(evidence, indent=1, allow_nan=False))


def _thinned(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of a long run keep the highest sample of each stretch: an hour at ten a second is no reading for a person."""
    size = -(-len(samples) // _MOST_SAMPLES) or 1
    return [
        max(samples[at : at + size], key=lambda sample: sample.get("memory_bytes", 0))
        for at in range(0, len(samples), size)
    ]
