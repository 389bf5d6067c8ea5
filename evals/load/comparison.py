"""FP16 and each scheme under the same traffic: what each takes, gives and costs, in one table and one picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BASELINE = "fp16"


@dataclass(frozen=True)
class Contender:
    """One scheme: its checkpoint's size in bytes, and the evidence of its load test."""

    name: str
    size_bytes: int
    load: Mapping[str, Any]


def table(contenders: Sequence[Contender], price_per_hour: float | None) -> list[dict[str, Any]]:
    """One row a contender, in their order; what was not measured is None.

    ``cost_per_million_tokens`` is that of output tokens on a machine of ``price_per_hour`` that is kept at its
    capacity: price / (tokens a second * 3600) * 10^6. Nobody runs at capacity all day; the ratio between schemes
    holds nevertheless.
    """
    return [_row(contender, price_per_hour) for contender in contenders]


def _row(contender: Contender, price: float | None) -> dict[str, Any]:
    metrics, found = contender.load["metrics"], contender.load["capacity"]
    names = (
        "peak_memory_bytes", "start_seconds", "error_rate", "p50_latency_ms", "p95_latency_ms", "p99_latency_ms",
        "p95_ttft_ms", "p50_tpot_ms", "output_tokens_per_second",
    )  # fmt: skip
    tokens = found["output_tokens_per_second"] if found else None
    profile = next(iter(contender.load["profiles"]), None)
    return {
        "name": contender.name,
        "size_bytes": contender.size_bytes,
        **{name: metrics.get(name) for name in names},
        "request_rate": profile["requested"]["rate"] if profile else None,
        "capacity_requests_per_second": found["requests_per_second"] if found else None,
        "capacity_interval": found["interval"] if found else None,
        "capacity_output_tokens_per_second": tokens,
        "cost_per_million_tokens": price / (tokens * 3600) * 1e6 if price is not None and tokens else None,
    }


def incomparable(contenders: Sequence[Contender]) -> list[str]:
    """Say what keeps the contenders from being compared: other traffic, another engine, other limits."""
    aspects: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "the traffic differs": lambda load: [each["requested"] for each in load["profiles"]],
        "the engine's version differs": lambda load: load["server"]["version"],
        "the container's limits differ": lambda load: [load["server"][name] for name in ("cpus", "memory_limit_bytes")],
    }
    found = [words for words, seen in aspects.items() if len({json.dumps(seen(each.load)) for each in contenders}) > 1]
    first, *others = [each.load for each in contenders]
    if any(differ_in_hardware(first, other) for other in others):
        found.append("the CPU, its cores or the GPU differ")
    return found


def differ_in_hardware(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two load tests are known to have been served by different hardware; the first evidence named none."""
    told = [load["server"].get("computed_on") for load in (one, other)]
    return None not in told and _speed_of(told[0]) != _speed_of(told[1])


def _speed_of(computed_on: Mapping[str, Any]) -> list[Any]:
    """Of hardware what latencies follow from: which cores they were does not matter; how many, and for whom, does."""
    cores = computed_on["cores"]
    return [
        computed_on["cpu_model"], computed_on["instruction_set"], cores and len(cores), computed_on["cores_shared"],
        bool(computed_on["gpu"]),
    ]  # fmt: skip
