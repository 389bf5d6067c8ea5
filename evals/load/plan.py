"""The ``load:`` section of a model's file: the traffic, the search for the capacity, and the limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator, model_validator

from evals.errors import EvaluationError
from evals.load.canary import Canary
from evals.load.capacity import CapacitySearch
from evals.load.slo import Positive, Slo
from evals.load.traffic import profile as profiles
from evals.load.traffic.profile import Lengths, TrafficProfile

CAUSES = Literal["client-late", "incomplete", "memory-unwatched", "no-gpu"]


class UnknownCanaryError(EvaluationError):
    """The canary is not known yet."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Memory(_Section):
    """The container's memory."""

    limit_bytes: ByteSize
    """The container's limit, `12GiB` or bytes."""
    headroom: float = Field(default=0.2, ge=0, lt=1)
    """The share of it that must be free at the peak."""
    gpu_headroom: float = Field(default=0.02, ge=0, lt=1)
    """The share of each GPU's memory that must be free at the peak. vLLM takes its own share at the start
    (`serve.gpu_memory`); what it takes beyond that is not foreseen.
    """
    max_leak_per_request: ByteSize = ByteSize(64 * 1024)
    """The largest leak for each request that a profile with a leak test (`soak`) may find: the lower end of the
    interval of the memory's slope.
    """


class Changes(_Section):
    """Changes of a traffic profile in a model's file; keys that are left out stay as in the profile."""

    request_rate: Positive | None = None
    """Requests a second."""
    seconds: Positive | None = None
    """How long requests arrive."""
    input_tokens: Lengths | None = None
    """The length of prompts, without a shared prefix."""
    output_tokens: Lengths | None = None
    """The length of answers."""
    seed: int | None = None
    """Draws due times, lengths and prompts."""
    warmup_requests: Annotated[int, Field(ge=0)] | None = None
    """Requests before the clock starts."""
    slo: Slo = Slo()
    """Limits."""

    def applied(self, profile: TrafficProfile) -> TrafficProfile:
        """Return the profile with these changes."""
        changed = {
            "rate": self.request_rate, "seconds": self.seconds, "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens, "seed": self.seed, "warmup_requests": self.warmup_requests,
        }  # fmt: skip
        said = {name: value for name, value in changed.items() if value is not None}
        return TrafficProfile.model_validate({**dict(profile), **said, "slo": self.slo.over(profile.slo)})


class LoadPlan(Changes):
    """The ``load:`` section: the traffic, and the limits that the server is held to under it.

    Keys of a profile beside ``profiles`` change all of them. The first profile's metrics have plain names, those of
    others begin with their profile's (``rag.p95_ttft_ms``).
    """

    prompts: Path
    """JSON lines of `{"text": …}`, as `file:PATH` or `builtin:heldout`; more text than any profile sends."""
    profiles: Mapping[str, Changes] = Field(default_factory=lambda: {"quick": Changes()}, min_length=1)
    """Profiles of `evals/load/traffic`: a list of names, or a mapping of names to changes."""
    request_timeout_s: Positive = 60.0
    """Seconds after which a request has failed."""
    start_timeout_s: Positive = 600.0
    """Seconds that the server has to become healthy."""
    max_recovery_s: Positive = 300.0
    """Seconds that the server has after a restart to answer again (`faults`)."""
    cpus: Positive | None = None
    """The most cores of the server; by default all that are free."""
    max_client_late_ms: Positive = 250.0
    """How late the load generator may be with one request in twenty, before the verdict is inconclusive."""
    canary: Canary | None = None
    """A prompt that must be answered correctly before any traffic. Without it the first release takes one from FP16's
    own answers, and writes it to the lock.
    """
    memory: Memory
    """The container's memory."""
    capacity: CapacitySearch | None = None
    """Search for the highest rate that keeps the limits, under the first profile."""
    faults: bool = False
    """Whether faults are injected at the end."""
    accept_inconclusive: Mapping[CAUSES, Annotated[str, Field(min_length=1)]] = {}
    """Causes of an inconclusive verdict that may pass, each with the reason."""

    @field_validator("profiles", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:  # noqa: ANN401 - whatever stands in the file
        if isinstance(given, Sequence) and not isinstance(given, str):
            given = {str(name): {} for name in given}
        for name in given if isinstance(given, Mapping) else ():
            try:
                profiles.read_profile(str(name))
            except profiles.TrafficProfileError as error:
                raise ValueError(str(error)) from error
        return given

    @model_validator(mode="after")
    def _fits(self) -> LoadPlan:
        _ = self.traffic
        return self

    @property
    def traffic(self) -> list[TrafficProfile]:
        """The profiles to send, each with its limits: the profile's, overridden by the plan's and by its section's."""
        return [own.applied(self.applied(profiles.read_profile(name))) for name, own in self.profiles.items()]

    @property
    def lifetime_s(self) -> float:
        """Seconds after which a container under this plan hangs: many times what its traffic and start take."""
        traffic = sum(profile.seconds + 4 * self.request_timeout_s for profile in self.traffic)
        steps = 0.0
        if self.search is not None:
            longest = self.search.longest_step_s(self.traffic[0].mean_rate, self.request_timeout_s)
            steps = self.search.max_steps * (2 * longest + 300)
        return 3600 + 2 * traffic + steps + (4 * self.start_timeout_s if self.faults else 0)

    @property
    def search(self) -> CapacitySearch | None:
        """How to search for the capacity; None if it is neither asked for nor limited."""
        held = self.traffic[0].slo.min_capacity_requests_per_second is not None
        return self.capacity or (CapacitySearch() if held else None)

    def known_canary(self) -> Canary:
        """Return the canary, which a load test needs.

        Raises:
            UnknownCanaryError: the model's file has none, and FP16 has not been asked yet.
        """
        if self.canary is None:
            raise UnknownCanaryError(
                "there is no canary yet: the first `slipway release` takes one from FP16's answers; or write "
                "`load.canary` into the model's file"
            )
        return self.canary

    def limits(self) -> dict[str, float]:
        """Every limit by the name of the metric that it bounds."""
        first, *others = self.traffic
        limits = first.slo.limits()
        limits["peak_memory_bytes"] = (1 - self.memory.headroom) * int(self.memory.limit_bytes)
        if any(profile.leak_test for profile in self.traffic):
            limits["leak_bytes_per_request"] = float(self.memory.max_leak_per_request)
        if self.faults:
            limits["faults_failed"] = 0.0
        for profile in others:
            own = profile.slo.limits()
            limits |= {f"{profile.name}.{name}": own[name] for name in own if name not in _OF_THE_SERVER}
        return limits


# Limits of the container, independent of the traffic.
_OF_THE_SERVER = frozenset({"start_seconds", "capacity_requests_per_second"})
_LIMITS_ONLY = {"slo"}


def load_key(plan: LoadPlan) -> dict[str, object]:
    """Return the part of a plan that determines the measurements, for their cache key; limits are only judged.

    With a search for the capacity the limits belong to it, because they determine which rates are tried. The caller
    adds the digest of ``plan.prompts``.
    """
    search = plan.search
    return {
        "traffic": [profile.model_dump(mode="json", exclude=_LIMITS_ONLY) for profile in plan.traffic],
        "capacity": None if search is None else {**search.model_dump(), "limits": plan.traffic[0].slo.limits()},
        "faults": plan.max_recovery_s if plan.faults else None,
        "canary": None if plan.canary is None else plan.canary.model_dump(),
        "memory": int(plan.memory.limit_bytes),
        "cpus": plan.cpus,
        "timeouts": [plan.request_timeout_s, plan.start_timeout_s],
    }
