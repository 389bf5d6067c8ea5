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
    expect: str
    answer: str | None
    error: str | None
    ok: bool


class ClientCost(_Document):
    """What the load generator took: processor time, wall time, and the most cores while requests were under way.

    ``schedule_began`` is when one run of it began, in seconds since the epoch.
    """

    cpu_seconds: float = 0.0
    seconds: float = 0.0
    cores: float | None = None
    schedule_began: float | None = None


class RequestedTraffic(_Document):
    """The traffic of a profile as it was asked for, shortened to the model's context where that was necessary."""

    name: str
    description: str = ""
    rate: float
    seconds: float
    arrivals: Arrivals = Arrivals()
    input_tokens: Lengths
    output_tokens: Lengths
    prefix: Prefix | None = None
    seed: int = 0
    warmup_requests: int = 0
    leak_test: bool = False
    requests: int

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
    exit_status: int | None = None
    is_complete: bool
    warmup_errors: tuple[str, ...] = ()
    client: ClientCost = ClientCost()
    requests: int
    sent: int
    answered: int
    errors: Mapping[str, int] = {}
    client_late_ms: Mapping[str, float] = {}


class Leak(_Document):
    """The slope of the server's memory under load, in bytes a second and a request."""

    bytes_per_second: Estimate
    bytes_per_request: Estimate
    samples: int


class ProfileResult(_Document):
    """One traffic profile: what was asked for, what was sent, and what was measured."""

    name: str
    requested: RequestedTraffic
    shortened: bool
    traffic: SentTraffic
    queue: Queue | None
    leak: Leak | None = None
    metrics: Metrics


class FaultResult(_Document):
    """One fault: what had to hold, what was seen, and whether it held; ``ok`` is None if it could not be inflicted.

    ``seconds`` is how long the recovery took, ``limit_seconds`` how long it may take.
    """

    name: str
    must: str
    seen: str
    ok: bool | None
    seconds: float | None = None
    limit_seconds: float | None = None


class GpuMemory(_Document):
    """The memory of one of the server's GPUs in bytes; ``peak_bytes`` is None if it was not sampled."""

    uuid: str
    total_bytes: int
    peak_bytes: int | None


class MemoryResult(_Document):
    """The server's memory in bytes: its limit, its peaks by source and by phase, leaks by profile, the prediction.

    ``hertz`` is how many samples a second there were; ``unwatched_seconds`` the longest time without one. ``gpus`` are
    in the order of the engine's ranks.
    """

    limit_bytes: int
    source: str | None = None
    samples: int = 0
    hertz: float | None = None
    unwatched_seconds: float = 0.0
    peak: Mapping[str, int | None] = {}
    phases: Mapping[str, int] = {}
    leaks: Mapping[str, Leak] = {}
    expected: MemoryPrediction | None = None
    gpus: tuple[GpuMemory, ...] = ()


class ServerResult(_Document):
    """The server: how it ended if it did, its start, its limits, its engine's version, and what computed its answers.

    ``start_seconds`` is None if it never became healthy. ``gpus`` are the UUIDs of its devices, and ``ranks`` is how
    many processes the model was divided among, each on a GPU or on cores of its own. ``requested`` is what it
    was asked to apply, ``report`` what its engine's log says that it applied. What evidence from before it was recorded
    lacks is None.
    """

    died: str | None
    start_seconds: float | None
    cpus: float | None = None
    gpus: tuple[str, ...] = ()
    ranks: int = 1
    network: str | None = None
    memory_limit_bytes: int
    version: str | None = None
    computed_on: ComputedOn | None = None
    requested: Requested | None = None
    report: EngineReport | None = None

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
    model: str | None
    canary: CanaryAnswer
    profiles: tuple[ProfileResult, ...]
    capacity: Capacity | None
    faults: tuple[FaultResult, ...] | None
    metrics: Metrics
    memory: MemoryResult
    client: ClientCost
    findings: tuple[str, ...] = ()
    lacking: str | None = None
    unsupported: bool = False
    speculation: Speculation | None = None
    server: ServerResult

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
