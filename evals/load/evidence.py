"""What ``load.json`` holds: one definition for the load test, which writes it, and for everything that reads it.

Keys stay as they are, because releases sign them. A document of an earlier version can be read: what it lacks has a
default, and its former metric names are renamed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from containers.sandbox.engine_report import EngineReport, Requested, not_applied
from containers.sandbox.kernels import ComputedOn, with_gpus
from evals.errors import LoadEvidenceError
from evals.load.capacity import Capacity
from evals.load.expected_memory import MemoryPrediction
from evals.load.queueing import Queue
from evals.load.slo import current_name
from evals.load.speculation import Speculation
from evals.load.traffic.profile import Arrivals, Lengths, Prefix, TrafficProfile

FILE = "load.json"

# An estimate with the ends of its 95% interval: estimate, lower, upper.
Estimate = tuple[float, float, float]


def _renamed(given: Any) -> Any:  # noqa: ANN401 - what the file holds, not yet checked
    if not isinstance(given, Mapping):
        return given
    return {current_name(name) if isinstance(name, str) else name: value for name, value in given.items()}


# Measurements by name; what could not be measured is absent.
Metrics = Annotated[Mapping[str, float], BeforeValidator(_renamed)]


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False, populate_by_name=True)


class CanaryAnswer(_Document):
    """What the canary's prompt got: an answer, or an error. ``ok``: the answer begins as expected."""

    prompt: str
    """The canary's prompt."""
    expect: str
    """How the answer must begin."""
    margin: float | None = Field(default=None, exclude_if=lambda margin: margin is None)
    """By how many nats FP16 prefers this token to the second, where the canary was taken from its answers."""
    answer: str | None
    """The answer."""
    error: str | None
    """The error, if there was no answer."""
    ok: bool
    """Whether the answer begins as expected."""


class ClientCost(_Document):
    """What the load generator took: processor time, wall time, and the most cores while requests were under way.

    ``schedule_began`` is when one run of it began, in seconds since the epoch.
    """

    cpu_seconds: float = 0.0
    """CPU time of the load generator."""
    seconds: float = 0.0
    """Time from its start to its end."""
    cores: float | None = None
    """Most cores used while requests were running."""
    schedule_began: float | None = None
    """When the schedule began, in seconds since the epoch."""


class RequestedTraffic(_Document):
    """The traffic of a profile as it was asked for, shortened to the model's context where that was necessary."""

    name: str
    """The profile's name."""
    description: str = ""
    """What the profile is for."""
    rate: float
    """Requests per second."""
    seconds: float
    """How long requests arrive."""
    arrivals: Arrivals = Arrivals()
    """How requests arrive."""
    input_tokens: Lengths
    """Length of the prompts."""
    output_tokens: Lengths
    """Length of the answers."""
    prefix: Prefix | None = None
    """Text that prompts share."""
    seed: int = 0
    """The seed of all random choices."""
    warmup_requests: int = 0
    """Requests sent first, which are not measured."""
    leak_test: bool = False
    """Whether memory leaks are judged."""
    requests: int
    """Number of requests."""

    @classmethod
    def of(cls, profile: TrafficProfile) -> RequestedTraffic:
        """The traffic that a profile asks for."""
        return cls.model_validate({**profile.model_dump(exclude={"slo"}), "requests": profile.requests})


class SentTraffic(_Document):
    """What the load generator made of a profile: requests that were due, that went out, and that were answered.

    ``errors`` counts the requests that were not answered, by their error; ``client_late_ms`` are percentiles (``p95``)
    of how late the client itself was. aiperf's ``exit_status`` proves nothing.
    """

    aiperf_version: str | None = None
    """The version of aiperf."""
    exit_status: int | None = None
    """The exit status of aiperf, which proves nothing."""
    is_complete: bool
    """Whether the whole profile ran."""
    warmup_errors: tuple[str, ...] = ()
    """Errors of the warm-up."""
    client: ClientCost = ClientCost()
    """The cost of the load generator."""
    requests: int
    """Requests that were due."""
    sent: int
    """Requests that were sent."""
    answered: int
    """Requests that were answered."""
    errors: Mapping[str, int] = {}
    """Requests that failed, by error."""
    client_late_ms: Mapping[str, float] = {}
    """How late the load generator sent requests, in milliseconds, by percentile."""


class Leak(_Document):
    """The slope of the server's memory under load, in bytes a second and a request."""

    bytes_per_second: Estimate
    """Growth per second, as estimate, lower and upper bound."""
    bytes_per_request: Estimate
    """Growth per request, as estimate, lower and upper bound."""
    samples: int
    """Number of memory samples."""


class ProfileResult(_Document):
    """One traffic profile: what was asked for, what was sent, and what was measured."""

    name: str
    """The profile's name."""
    requested: RequestedTraffic
    """The requested traffic."""
    shortened: bool
    """Whether prompts or answers were shortened to the model's context."""
    traffic: SentTraffic
    """What the load generator sent."""
    queue: Queue | None
    """The requests in the server over time."""
    leak: Leak | None = None
    """The growth of the server's memory."""
    metrics: Metrics
    """The measured values, by name."""


class FaultResult(_Document):
    """One fault: what had to hold, what was seen, and whether it held; ``ok`` is None if it could not be inflicted.

    ``seconds`` is how long the recovery took, ``limit_seconds`` how long it may take.
    """

    name: str
    """The fault."""
    must: str
    """What was required."""
    seen: str
    """What happened."""
    ok: bool | None
    """Whether the requirement was met; none if the fault could not be caused."""
    seconds: float | None = None
    """How long recovery took."""
    limit_seconds: float | None = None
    """How long recovery may take."""


class GpuMemory(_Document):
    """The memory of one of the server's GPUs in bytes; ``peak_bytes`` is None if it was not sampled."""

    uuid: str
    """The GPU's UUID."""
    total_bytes: int
    """The GPU's memory."""
    peak_bytes: int | None
    """The most memory used; none if it was not sampled."""


class MemoryResult(_Document):
    """The server's memory in bytes: its limit, its peaks by source and by phase, leaks by profile, the prediction.

    ``hertz`` is how many samples a second there were; ``unwatched_seconds`` the longest time without one. ``gpus`` are
    in the order of the engine's ranks.
    """

    limit_bytes: int
    """The server's memory limit."""
    source: str | None = None
    """Where the peak was read."""
    samples: int = 0
    """Number of samples."""
    hertz: float | None = None
    """Samples per second."""
    unwatched_seconds: float = 0.0
    """The longest time without a sample."""
    peak: Mapping[str, int | None] = {}
    """The most memory used, by source."""
    phases: Mapping[str, int] = {}
    """The most memory used, by phase of the test."""
    leaks: Mapping[str, Leak] = {}
    """The growth of memory, by profile."""
    expected: MemoryPrediction | None = None
    """The predicted memory."""
    gpus: tuple[GpuMemory, ...] = ()
    """The memory of each GPU, in the order of the engine's ranks."""


class ServerResult(_Document):
    """The server: how it ended if it did, its start, its limits, its engine's version, and what computed its answers.

    ``start_seconds`` is None if it never became healthy. ``gpus`` are the UUIDs of its devices, and ``ranks`` is how
    many processes the model was divided among, each on a GPU or on cores of its own. ``requested`` is what it
    was asked to apply, ``report`` what its engine's log says that it applied. What evidence from before it was recorded
    lacks is None.
    """

    died: str | None
    """How the server stopped, if it did."""
    start_seconds: float | None
    """Time until it was healthy; none if it never was."""
    cpus: float | None = None
    """Its CPU limit."""
    gpus: tuple[str, ...] = ()
    """The UUIDs of its GPUs."""
    ranks: int = 1
    """Number of processes that the model is divided among."""
    network: str | None = None
    """Its network."""
    memory_limit_bytes: int
    """Its memory limit."""
    version: str | None = None
    """The engine's version."""
    computed_on: ComputedOn | None = None
    """The hardware and kernels that computed the answers."""
    requested: Requested | None = None
    """The requested configuration."""
    report: EngineReport | None = None
    """What the engine's log says was applied."""

    @property
    def not_applied(self) -> list[str]:
        """What was requested and not applied, as far as the engine's log says it."""
        if self.requested is None or self.report is None:
            return []
        return not_applied(self.requested, self.report, on_gpu=bool(self.gpus))

    @model_validator(mode="before")
    @classmethod
    def _one_gpu(cls, given: Any) -> Any:  # noqa: ANN401 - what the file holds, not yet checked
        return with_gpus(given)

    @property
    def cores(self) -> float | None:
        """How many cores it had: its limit, or those that it was given by number; None where that is unknown."""
        given = self.computed_on.cores if self.computed_on is not None else None
        return self.cpus or (float(len(given)) if given else None)


class LoadEvidence(_Document):
    """Everything a load test saw. ``findings`` are sentences for a person that no limit is about.

    ``faults`` and ``capacity`` are None where they were not asked for, ``speculation`` where the server has none.
    ``lacking`` says why nothing was measured; with ``unsupported`` it is the configuration, which needs another device.
    """

    schema_: Annotated[Literal["slipway/load/2"], Field(alias="schema")] = "slipway/load/2"
    """The format of this document."""
    model: str | None
    """The model's name in the API."""
    canary: CanaryAnswer
    """The answer to the canary's prompt."""
    profiles: tuple[ProfileResult, ...]
    """The result of each traffic profile."""
    capacity: Capacity | None
    """The result of the capacity search; none if it was not requested."""
    faults: tuple[FaultResult, ...] | None
    """The result of each fault; none if faults were not requested."""
    metrics: Metrics
    """The values that the limits judge, by name."""
    models: Mapping[str, Metrics] = {}
    """The metrics of the requests to the model and to each adapter, where adapters are served next to it."""
    memory: MemoryResult
    """The server's memory."""
    client: ClientCost
    """The cost of the load generator."""
    findings: tuple[str, ...] = ()
    """Observations that no limit is about."""
    lacking: str | None = None
    """Why nothing was measured, if so."""
    unsupported: bool = False
    """Whether the reason is a configuration that needs another device."""
    speculation: Speculation | None = None
    """Results of speculative decoding."""
    server: ServerResult
    """The server that was tested."""

    def format(self) -> str:
        """The text of ``load.json``."""
        return self.model_dump_json(by_alias=True, indent=1)


def parse_load_evidence(data: str | bytes, where: str) -> LoadEvidence:
    """Parse ``load.json``; ``where`` names the file in an error.

    Raises:
        LoadEvidenceError: it is not a load test's evidence.
    """
    try:
        return LoadEvidence.model_validate_json(data)
    except ValidationError as error:
        raise LoadEvidenceError.of(error, where) from error


def read_load_evidence(folder: Path) -> LoadEvidence:
    """Read ``load.json`` in ``folder``.

    Raises:
        LoadEvidenceError: it can't be read, or is not a load test's evidence.
    """
    path = folder / FILE
    try:
        return parse_load_evidence(path.read_bytes(), str(path))
    except OSError as error:
        raise LoadEvidenceError(f"{path} can't be read ({error.strerror}): run the load test again") from error
