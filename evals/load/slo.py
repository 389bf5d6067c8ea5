"""The service level objectives of a server by name, and how a measurement compares with each limit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

PERCENTILES = (50, 90, 95, 99)
# Columns of requests.jsonl whose percentiles are metrics, `p95_latency_ms` for one.
DISTRIBUTIONS = ("latency_ms", "ttft_ms", "tpot_ms")
# Lower limits: the metric must reach them. In the YAML each is `min_` and its metric's name.
FLOORS = frozenset({"output_tokens_per_second", "requests_per_second", "capacity_requests_per_second"})
# Former names of the time per output token, in older models' files and older evidence.
_FORMER = {f"p{share}_inter_token_ms": f"p{share}_tpot_ms" for share in PERCENTILES}


class Slo(BaseModel):
    """Limits of the service level. A metric without a limit is measured and not judged.

    Percentiles are over the answered requests, by nearest rank.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    p50_latency_ms: Positive | None = None
    """Percentile 50 of the milliseconds of the whole answer, from the moment the request was due."""
    p90_latency_ms: Positive | None = None
    """Percentile 90 of the milliseconds of the whole answer, from the moment the request was due."""
    p95_latency_ms: Positive | None = None
    """Percentile 95 of the milliseconds of the whole answer, from the moment the request was due."""
    p99_latency_ms: Positive | None = None
    """Percentile 99 of the milliseconds of the whole answer, from the moment the request was due."""
    p50_ttft_ms: Positive | None = None
    """Percentile 50 of the milliseconds to the first token, from the moment the request was due."""
    p90_ttft_ms: Positive | None = None
    """Percentile 90 of the milliseconds to the first token, from the moment the request was due."""
    p95_ttft_ms: Positive | None = None
    """Percentile 95 of the milliseconds to the first token, from the moment the request was due."""
    p99_ttft_ms: Positive | None = None
    """Percentile 99 of the milliseconds to the first token, from the moment the request was due."""
    p50_tpot_ms: Positive | None = None
    """Percentile 50 of the milliseconds per output token after the first."""
    p90_tpot_ms: Positive | None = None
    """Percentile 90 of the milliseconds per output token after the first."""
    p95_tpot_ms: Positive | None = None
    """Percentile 95 of the milliseconds per output token after the first."""
    p99_tpot_ms: Positive | None = None
    """Percentile 99 of the milliseconds per output token after the first."""
    error_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of the requests due that got no good answer."""
    start_seconds: Positive | None = None
    """Seconds from the container's creation to its first healthy answer."""
    min_output_tokens_per_second: Positive | None = None
    """Output tokens a second, at least."""
    min_requests_per_second: Positive | None = None
    """Answered requests a second, at least."""
    min_capacity_requests_per_second: Positive | None = None
    """The highest rate that keeps the other limits, at least; it is then searched for."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, given: Any) -> Any:  # noqa: ANN401 - whatever stands in the file
        if not isinstance(given, Mapping):
            return given
        return {current_name(key) if isinstance(key, str) else key: value for key, value in given.items()}

    def over(self, defaults: Slo) -> Slo:
        """Return these limits, and those of ``defaults`` that are not set here."""
        own = self.model_dump(include=self.model_fields_set)
        return Slo.model_validate({**defaults.model_dump(include=defaults.model_fields_set), **own})

    def limits(self) -> dict[str, float]:
        """Every limit by the name of the metric that it bounds."""
        return {name.removeprefix("min_"): value for name, value in self.model_dump().items() if value is not None}


def current_name(metric: str) -> str:
    """The present name of a metric, of whichever profile (``chat.p99_tpot_ms``), that may go by a former one."""
    prefix, dot, name = metric.rpartition(".")
    return f"{prefix}{dot}{_FORMER.get(name, name)}"


def percentile(values: Iterable[float], share: float) -> float:
    """Return the nearest-rank percentile: the least value that ``share`` percent of the values don't exceed.

    It is always one of the values.
    """
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share / 100 * len(ordered)) - 1)]


def is_floor(name: str) -> bool:
    """Whether a metric, of whichever profile (``chat.requests_per_second``), is bounded from below."""
    return plain(name) in FLOORS


def plain(name: str) -> str:
    """The metric's own name, without its profile's."""
    return name.rpartition(".")[2]


def met(name: str, metrics: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Whether a metric is within its limit, compared unrounded; a missing metric is not."""
    if name not in metrics:
        return False
    return metrics[name] >= limits[name] if is_floor(name) else metrics[name] <= limits[name]


def sentence(name: str, metrics: Mapping[str, float], limits: Mapping[str, float]) -> str:
    """One metric against its limit, for a person."""
    if name not in metrics:
        return f"{name} could not be measured (limit {shown(name, limits[name])})"
    good = met(name, metrics, limits)
    sign = ("≥" if good else "<") if is_floor(name) else ("≤" if good else ">")
    return f"{name} {shown(name, metrics[name])} {sign} {shown(name, limits[name])}"


def shown(name: str, value: float) -> str:
    """A measurement with its unit, which its name states."""
    if "bytes" in plain(name):
        per = " a request" if name.endswith("per_request") else ""
        return (f"{value / 2**30:.2f} GiB" if abs(value) >= 2**28 else f"{value / 2**20:.3f} MiB") + per
    if name.endswith("error_rate"):
        return f"{value:.2%}"
    if name.endswith("_ms"):
        return f"{value:,.1f} ms"
    return f"{value:,.1f}" + (" s" if plain(name) in {"start_seconds", "recovery_seconds"} else "")
