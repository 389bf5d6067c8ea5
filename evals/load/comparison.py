"""FP16 and each scheme under the same traffic: the rows of their comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from containers.sandbox.kernels import ComputedOn
from evals.load.evidence import LoadEvidence

BASELINE = "fp16"


@dataclass(frozen=True)
class ComparedScheme:
    """One scheme: its checkpoint's size in bytes, and the evidence of its load test."""

    name: str
    size_bytes: int
    load: LoadEvidence


class ComparisonRow(BaseModel):
    """One scheme of a comparison; what was not measured is None.

    ``cost_per_million_tokens`` is the cost of output tokens on a machine that is kept at its capacity: price /
    (tokens a second * 3600) * 10^6. No machine is at its capacity all day, but the ratio between schemes holds.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    size_bytes: int
    peak_memory_bytes: float | None = None
    start_seconds: float | None = None
    error_rate: float | None = None
    p50_latency_ms: float | None = None
    p95_latency_ms: float | None = None
    p99_latency_ms: float | None = None
    p95_ttft_ms: float | None = None
    p50_tpot_ms: float | None = None
    output_tokens_per_second: float | None = None
    request_rate: float | None = None
    capacity_requests_per_second: float | None = None
    capacity_interval: tuple[float | None, float | None] | None = None
    capacity_output_tokens_per_second: float | None = None
    cost_per_million_tokens: float | None = None

    def measure(self, name: str) -> float | None:
        """A measure by its name."""
        value: float | None = getattr(self, name)
        return value


_METRICS = (
    "peak_memory_bytes", "start_seconds", "error_rate", "p50_latency_ms", "p95_latency_ms", "p99_latency_ms",
    "p95_ttft_ms", "p50_tpot_ms", "output_tokens_per_second",
)  # fmt: skip
# The measures in the order in which they are shown.
MEASURES = tuple(name for name in ComparisonRow.model_fields if name not in {"name", "capacity_interval"})


def table(schemes: Sequence[ComparedScheme], price_per_hour: float | None) -> list[ComparisonRow]:
    """One row for each scheme, in their order."""
    return [_row(scheme, price_per_hour) for scheme in schemes]


def _row(scheme: ComparedScheme, price: float | None) -> ComparisonRow:
    metrics, found = scheme.load.metrics, scheme.load.capacity
    tokens = found.output_tokens_per_second if found else None
    profile = next(iter(scheme.load.profiles), None)
    return ComparisonRow(
        name=scheme.name,
        size_bytes=scheme.size_bytes,
        **{name: metrics[name] for name in _METRICS if name in metrics},
        request_rate=profile.requested.rate if profile else None,
        capacity_requests_per_second=found.requests_per_second if found else None,
        capacity_interval=found.interval if found else None,
        capacity_output_tokens_per_second=tokens,
        cost_per_million_tokens=price / (tokens * 3600) * 1e6 if price is not None and tokens else None,
    )


def incomparable(schemes: Sequence[ComparedScheme]) -> list[str]:
    """Say why the schemes can't be compared: other traffic, another engine, other limits, other hardware."""
    aspects: dict[str, Callable[[LoadEvidence], object]] = {
        "the traffic differs": lambda load: [each.requested for each in load.profiles],
        "the engine's version differs": lambda load: load.server.version,
        "the container's limits differ": lambda load: (load.server.cpus, load.server.memory_limit_bytes),
    }
    first, *others = [each.load for each in schemes]
    found = [words for words, seen in aspects.items() if any(seen(other) != seen(first) for other in others)]
    if any(differ_in_hardware(first, other) for other in others):
        found.append("the CPU, its cores or the GPU differ")
    return found


def differ_in_hardware(one: LoadEvidence, other: LoadEvidence) -> bool:
    """Whether two load tests ran on hardware that is known to differ; early evidence does not state its hardware."""
    first, second = one.server.computed_on, other.server.computed_on
    return first is not None and second is not None and _speed_of(first) != _speed_of(second)


def _speed_of(hardware: ComputedOn) -> tuple[object, ...]:
    """What latencies depend on: the CPU, how many cores and whether they were shared, but not which cores."""
    return (
        hardware.cpu_model, hardware.instruction_set, hardware.cores and len(hardware.cores), hardware.cores_shared,
        len(hardware.gpus),
    )  # fmt: skip
