"""Metrics from a load test's measurements, by their limits' names; memory, the client's cost, and findings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from containers.hardware.gpu import gpus
from containers.sandbox.memory import MemorySample
from containers.sandbox.sandbox import Server
from evals.errors import LoadEvidenceError
from evals.load import evidence as documents
from evals.load import requests as records
from evals.load.capacity import Capacity
from evals.load.evidence import ClientCost, FaultResult, GpuMemory, Leak, LoadEvidence, MemoryResult, ProfileResult
from evals.load.expected_memory import ExpectedMemory, compared
from evals.load.requests import RequestRecord
from evals.load.slo import DISTRIBUTIONS, PERCENTILES, percentile
from evals.load.traffic.profile import TrafficProfile
from evals.statistics.trend import slope

MEMORY = "memory.json"
_SAMPLES = TypeAdapter(list[MemorySample])
_MOST_SAMPLES = 6000
# The slope of the memory is fitted after this share of the traffic, once pools and caches are full.
_SETTLING_SHARE = 0.2
# A client that takes more cores than this may slow the server down.
_COSTLY_CORES = 1.0


def request_metrics(requests: Sequence[RequestRecord]) -> dict[str, float]:
    """The metrics of a profile's requests, by the names of the limits; what could not be measured is absent."""
    metrics: dict[str, float] = {}
    if not requests:
        return metrics
    good = [request for request in requests if request.answered]
    metrics["error_rate"] = (len(requests) - len(good)) / len(requests)
    for column in DISTRIBUTIONS:
        values = [value for request in good if (value := request.column(column)) is not None]
        if values:
            metrics |= {f"p{share}_{column}": percentile(values, share) for share in PERCENTILES}
    if good:
        ended = max(request.due_ms + (request.latency_ms or 0.0) for request in good)
        seconds = (ended - min(request.sent_ms for request in good)) / 1000
        metrics["output_tokens_per_second"] = sum(request.output_tokens or 0 for request in good) / seconds
        metrics["requests_per_second"] = len(good) / seconds
    return metrics


def by_model(requests: Sequence[RequestRecord]) -> dict[str, dict[str, float]]:
    """The metrics of the model and of each adapter, by the name that requests asked for; empty without adapters."""
    names = sorted({request.model for request in requests if request.model is not None})
    return {name: request_metrics([request for request in requests if request.model == name]) for name in names}


def all_metrics(
    server: Server,
    measured: Sequence[ProfileResult],
    found: Capacity | None,
    survived: Sequence[FaultResult] | None,
) -> dict[str, float]:
    """Everything that a limit can be set for, by name; what could not be measured is absent."""
    metrics: dict[str, float] = {"start_seconds": server.started_seconds}
    peak = server.memory.peak(outside="faults")
    if peak is not None:
        metrics["peak_memory_bytes"] = float(peak)
    for number in range(len(server.gpus)):
        peak = server.memory.peak(f"gpu_{number}_memory_bytes", outside="faults")
        if peak is not None:
            metrics[gpu_metric(number)] = float(peak)
    for number, each in enumerate(measured):
        prefix = f"{each.name}." if number else ""
        metrics |= {f"{prefix}{name}": value for name, value in each.metrics.items()}
    leaks = [each.leak.bytes_per_request[1] for each in measured if each.leak]
    if leaks:
        metrics["leak_bytes_per_request"] = max(leaks)
    # No rate beside one that failed: the level holds at no rate. No rate at all: the search was inconclusive.
    if found is not None and (found.requests_per_second is not None or found.first_failing is not None):
        metrics["capacity_requests_per_second"] = found.requests_per_second or 0.0
        metrics["capacity_output_tokens_per_second"] = found.output_tokens_per_second or 0.0
    if survived is not None:
        metrics["faults_failed"] = float(sum(fault.ok is False for fault in survived))
    return metrics


def gpu_metric(number: int) -> str:
    """The name of the peak of the memory of one of the server's GPUs, and of its limit."""
    return f"gpu_{number}_peak_bytes"


def leak(samples: Sequence[MemorySample], profile: TrafficProfile) -> Leak | None:
    """The slope of the memory under load; None where there are too few samples."""
    loaded = [
        (sample.seconds, float(sample.memory_bytes))
        for sample in samples
        if sample.phase == "load" and sample.memory_bytes is not None
    ]
    settled = loaded[int(_SETTLING_SHARE * len(loaded)) :]
    try:
        found = slope([seconds for seconds, _ in settled], [size for _, size in settled])
    except ValueError:
        return None
    rate = profile.requests / profile.seconds
    return Leak(
        bytes_per_second=(found.estimate, found.lower, found.upper),
        bytes_per_request=(found.estimate / rate, found.lower / rate, found.upper / rate),
        samples=len(settled),
    )


def memory(
    server: Server, measured: Sequence[ProfileResult], expected: ExpectedMemory | None, unwatched: float
) -> MemoryResult:
    """The server's memory in the load test; its peaks leave the faults out.

    ``unwatched`` is the longest time without a sample, in seconds, faults left out.
    """
    sampler = server.memory
    names = sorted({name for sample in sampler.samples for name in sample.readings})
    peaks = {name: sampler.peak(name, outside="faults") for name in names}
    totals = {gpu.uuid: gpu.memory_bytes for gpu in gpus()} if server.gpus else {}
    return MemoryResult(
        limit_bytes=server.memory_bytes,
        source=sampler.source,
        samples=len(sampler.samples),
        hertz=sampler.hertz(),
        unwatched_seconds=unwatched,
        peak=peaks,
        phases=sampler.peaks_by_phase(),
        leaks={each.name: each.leak for each in measured if each.leak},
        expected=None if expected is None else compared(expected, peaks),
        gpus=tuple(
            GpuMemory(uuid=uuid, total_bytes=totals[uuid], peak_bytes=peaks.get(f"gpu_{number}_memory_bytes"))
            for number, uuid in enumerate(server.gpus)
            if uuid in totals
        ),
    )


def client_cost(drives: Sequence[ClientCost]) -> ClientCost:
    """What the load generator took over all its runs: processor time, wall time, and the most cores of any."""
    return ClientCost(
        cpu_seconds=sum(each.cpu_seconds for each in drives),
        seconds=sum(each.seconds for each in drives),
        cores=max((each.cores for each in drives if each.cores is not None), default=None),
    )


def findings(evidence: LoadEvidence) -> tuple[str, ...]:
    """What a person should know and no limit is about."""
    found = []
    cores = evidence.client.cores
    if cores is not None and cores > _COSTLY_CORES:
        found.append(
            f"the load generator itself took {cores:.2f} cores, which the server lacked if the two share a machine"
        )
    if evidence.server.computed_on is not None and evidence.server.computed_on.cores_shared:
        found.append("the server shared its cores with other servers, which slowed it down while they were busy")
    expected = evidence.memory.expected
    if expected is not None and expected.off:
        found.append(expected.sentence)
    left_out = [fault.name for fault in evidence.faults or () if fault.ok is None]
    if left_out:
        found.append(f"some faults could not be inflicted: {', '.join(left_out)}")
    for each in evidence.profiles:
        if each.shortened:
            found.append(
                f"`{each.name}` was shortened to the model's context: its measurements are of shorter requests"
            )
        if wrong := each.traffic.warmup_errors:
            found.append(f"{len(wrong)} warm-up requests of `{each.name}` failed: {wrong[0]}")
        if each.queue and each.queue.growing:
            found.append(f"the queue grew all through `{each.name}`: the server is saturated at that rate")
    return tuple(found)


def write(
    folder: Path, evidence: LoadEvidence, requests: Sequence[RequestRecord], samples: Sequence[MemorySample]
) -> None:
    """Write ``load.json``, ``requests.jsonl`` and ``memory.json``."""
    (folder / records.FILE).write_text(records.format_requests(requests), encoding="utf-8")
    (folder / MEMORY).write_bytes(_SAMPLES.dump_json(_thinned(samples), exclude_none=True))
    write_evidence(folder, evidence)


def write_evidence(folder: Path, evidence: LoadEvidence) -> None:
    """Write ``load.json`` alone."""
    (folder / documents.FILE).write_text(evidence.format(), encoding="utf-8")


def read_samples(folder: Path) -> list[MemorySample]:
    """Read ``memory.json`` in ``folder``.

    Raises:
        LoadEvidenceError: it is missing, or not what `write` writes.
    """
    path = folder / MEMORY
    try:
        return _SAMPLES.validate_json(path.read_bytes())
    except OSError as error:
        raise LoadEvidenceError(f"{path} can't be read ({error.strerror}): run the load test again") from error
    except ValidationError as error:
        raise LoadEvidenceError.of(error, str(path)) from error


def _thinned(samples: Sequence[MemorySample]) -> list[MemorySample]:
    """Keep the highest sample of each stretch of a long run, so that a report can show them all."""
    size = -(-len(samples) // _MOST_SAMPLES) or 1
    return [
        max(samples[at : at + size], key=lambda sample: sample.memory_bytes or 0) for at in range(0, len(samples), size)
    ]
