"""The load test: whether the image answers correctly and fast, without errors, within its memory.

`measure` asks the canary, sends open-loop traffic through a worker, searches for the capacity and injects faults where
the plan says so, and writes ``load.json``; `judge` compares that with the model's limits.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict

import httpx
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, ValidationError

from containers.sandbox.engine_report import Requested
from containers.sandbox.sandbox import Server
from evals.errors import EvaluationError
from evals.load import capacity as capacities
from evals.load import faults, measurements
from evals.load.canary import Canary
from evals.load.capacity import Capacity
from evals.load.engine_metrics import Scrape, pool, scrape
from evals.load.evidence import (
    CanaryAnswer,
    ClientCost,
    FaultResult,
    LoadEvidence,
    MemoryResult,
    ProfileResult,
    RequestedTraffic,
    SentTraffic,
    ServerResult,
)
from evals.load.expected_memory import ExpectedMemory
from evals.load.load_gate import GATE, is_conclusive, judge
from evals.load.plan import LoadPlan, Memory, load_key
from evals.load.queueing import queue
from evals.load.requests import FILE as REQUESTS
from evals.load.requests import RequestRecord, parse_requests
from evals.load.slo import PERCENTILES, Slo, percentile
from evals.load.speculation import Speculation
from evals.load.traffic.profile import TrafficProfile
from evals.load.traffic.schedule import Planned, Schedule
from evals.load.traffic.schedule import plan as schedule_of
from evals.workers import RunWorker
from registry import untrusted
from registry.errors import UntrustedFileError, first_problem
from registry.progress import Progress

__all__ = [
    "GATE",
    "Canary",
    "LoadError",
    "LoadPlan",
    "Memory",
    "Slo",
    "TrafficProgress",
    "add_speculation",
    "is_conclusive",
    "judge",
    "load_key",
    "measure",
    "percentile",
    "write_unhealthy",
    "write_unsupported",
    "write_without_gpu",
]  # fmt: skip

CLIENT = Path(__file__).parent / "traffic" / "client.py"
_LIVE_SECONDS = 0.25
# The most bytes that are read of a load generator's records, some hundred each, and of its progress.
_RECORDS_BYTES, _PROGRESS_BYTES = 1 << 30, 1 << 16
# The engine's metrics are read once a second, which costs it a few milliseconds.
_LOOKS_PER_SCRAPE = 4
# Memory is sampled for this long after the last answer, to see whether the server gives it back.
_COOL_DOWN_SECONDS = 1.0
# A profile that takes no longer is sent again if the load generator was late: it may have been one hiccup.
_SHORT_SECONDS = 60.0


class ClientProgress(BaseModel):
    """How a run of the load generator goes (`evals.load.traffic.client.Watch`): requests, seconds, milliseconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    phase: Literal["preparing", "warm-up", "load", "done"]
    total: NonNegativeInt
    answered: NonNegativeInt
    errors: NonNegativeInt
    elapsed_s: float
    tokens_per_second: float
    p50_latency_ms: NonNegativeFloat | None
    p95_latency_ms: NonNegativeFloat | None
    p95_ttft_ms: NonNegativeFloat | None


class TrafficProgress(ClientProgress):
    """The same, with the ``purpose`` of the traffic (a profile, or the search for the capacity) and its rate."""

    purpose: str
    rate: float


Live = Callable[[TrafficProgress], None]


class DueRequest(TypedDict):
    """One request, as `evals.load.traffic.schedule.Planned` has it."""

    due_ms: int
    input_tokens: int
    output_tokens: int
    prefix: int | None


class DueRequests(TypedDict):
    """All requests, as `evals.load.traffic.schedule.Schedule` has them."""

    requests: Sequence[DueRequest]
    warmup: Sequence[DueRequest]
    prefix_tokens: Sequence[int]


class ClientRequest(TypedDict):
    """The request to the load generator (`evals.load.traffic.client`), which says what each key means."""

    url: str
    models: Sequence[str]
    tokenizer: str
    prompts: str
    schedule: DueRequests
    skip: int
    request_timeout_s: float
    seed: int
    output: str


class ClientResult(BaseModel):
    """The result of the load generator, beside its records in ``requests.jsonl``."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    aiperf_version: str | None
    exit_status: int
    is_complete: bool
    warmup_errors: tuple[str, ...]
    prompts_used: int
    client: ClientCost


class LoadError(EvaluationError):
    """The load test could not be run; the message says why."""


@dataclass
class Tester:
    """What one load test works with: a healthy server in the sandbox, the load generator, and what it has sent."""

    server: Server
    plan: LoadPlan
    models: tuple[str, ...]
    tokenizer: Path
    scratch: Path
    run_worker: RunWorker
    progress: Progress
    live: Live = lambda _: None
    requests: list[RequestRecord] = field(default_factory=list)
    prompts_used: int = 0
    drives: int = 0
    client: list[ClientCost] = field(default_factory=list)
    scrapes: list[Scrape] = field(default_factory=list)

    def drive(self, profile: TrafficProfile, purpose: str) -> tuple[SentTraffic, list[RequestRecord]]:
        """Send a profile's traffic from the worker; return its own account of it, and the requests' records.

        Raises:
            LoadError: the worker's result does not have the expected form.
        """
        self.drives += 1
        folder = self.scratch / str(self.drives)
        output = folder / "output"
        output.mkdir(parents=True)
        request = ClientRequest(
            url=self.server.url, models=self.models, tokenizer=str(self.tokenizer.resolve()),
            prompts=str(self.plan.prompts.resolve()), schedule=_due(schedule_of(profile)), skip=self.prompts_used,
            request_timeout_s=self.plan.request_timeout_s, seed=self.plan.seed or 0, output=str(output.resolve()),
        )  # fmt: skip
        with self._watched(folder / "progress.json", purpose, profile.rate):
            returned = self.run_worker("aiperf", CLIENT, request, folder)
        try:
            result = ClientResult.model_validate(returned)
        except ValidationError as error:
            raise LoadError(f"the load generator's result is not valid: {first_problem(error)}") from error
        requests = parse_requests(untrusted.read(output, REQUESTS, _RECORDS_BYTES), f"the load generator's {REQUESTS}")
        self.prompts_used = result.prompts_used
        self.client.append(result.client)
        late = [request.late_ms for request in requests if request.late_ms is not None]
        sent = SentTraffic(
            **result.model_dump(exclude={"prompts_used"}),
            requests=len(requests),
            sent=len(late),
            answered=sum(request.answered for request in requests),
            errors=Counter(request.error for request in requests if request.error is not None),
            client_late_ms={f"p{share}": percentile(late, share) for share in PERCENTILES} if late else {},
        )
        return sent, requests

    @contextlib.contextmanager
    def _watched(self, file: Path, purpose: str, rate: float) -> Iterator[None]:
        """Pass on the worker's progress, and label the memory samples with its phase."""
        ended = threading.Event()
        self.scrapes.clear()

        def watch() -> None:
            looks = 0
            while not ended.wait(_LIVE_SECONDS):
                looks += 1
                if looks % _LOOKS_PER_SCRAPE == 0 and (seen := scrape(self.server.url)):
                    self.scrapes.append(seen)
                with contextlib.suppress(OSError, ValueError, UntrustedFileError):
                    data = untrusted.read(file.parent, file.name, _PROGRESS_BYTES)
                    going = ClientProgress.model_validate_json(data)
                    if going.phase in {"warm-up", "load"}:
                        self.server.memory.phase = going.phase
                    self.live(TrafficProgress(**going.model_dump(), purpose=purpose, rate=rate))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.server.memory.phase = "after"


def _due(schedule: Schedule) -> DueRequests:
    def each(planned: Sequence[Planned]) -> list[DueRequest]:
        return [
            DueRequest(
                due_ms=one.due_ms, input_tokens=one.input_tokens, output_tokens=one.output_tokens, prefix=one.prefix
            )
            for one in planned
        ]

    return DueRequests(
        requests=each(schedule.requests), warmup=each(schedule.warmup), prefix_tokens=schedule.prefix_tokens
    )


def measure(
    server: Server,
    plan: LoadPlan,
    *,
    tokenizer: Path,
    folder: Path,
    scratch: Path,
    run_worker: RunWorker,
    progress: Progress,
    live: Live = lambda _: None,
    expected: ExpectedMemory | None = None,
    requested: Requested | None = None,
) -> LoadEvidence:
    """Put a healthy server under the plan's traffic and write the evidence into ``folder``.

    Writes ``load.json`` (the evidence, also returned), ``requests.jsonl`` (a line for each request that was due, with
    its profile) and ``memory.json`` (the samples). A server that fails the canary gets no traffic.

    Args:
        server: the server, in the sandbox.
        plan: the traffic.
        tokenizer: the folder of the model's tokenizer.
        folder: where the evidence goes.
        scratch: an existing folder for the worker.
        run_worker: runs ``evals/load/traffic/client.py`` in the ``aiperf`` environment.
        progress: called with a line for each thing that happens.
        live: called several times a second with the progress of the traffic.
        expected: the prediction of the server's memory.
        requested: what the server's engine was asked to apply.

    Raises:
        LoadError: the server doesn't say what it serves, or the load generator's result is not valid.
        LoadEvidenceError: the load generator's records are not valid.
    """
    models, context = _served_models(server)
    model = models[0]
    tester = Tester(server, plan, models, tokenizer, scratch, run_worker, progress, live)
    canary = _ask_canary(server, model, plan)
    measured: list[ProfileResult] = []
    found: Capacity | None = None
    survived: Sequence[FaultResult] | None = None
    if canary.ok:
        progress("the canary's answer is as expected")
        measured = [_profile(tester, profile, context) for profile in plan.traffic if server.died() is None]
        if plan.search is not None and server.died() is None:
            found = _capacity(tester, context)
        server.memory.phase = "cool-down"
        time.sleep(_COOL_DOWN_SECONDS)
    else:
        progress("the canary's answer is not as expected: no traffic is sent")
    failure, version = server.failed(), _version(server)
    unwatched = server.memory.longest_gap()
    if plan.faults and canary.ok and failure is None:
        server.memory.phase = "faults"
        survived = faults.inflict(server, model, context, recovery_s=plan.max_recovery_s, progress=progress)
    server.memory.stop()
    seen = ServerResult(
        died=None if failure is None else str(failure),
        start_seconds=server.started_seconds,
        cpus=server.cpus,
        gpus=server.gpus,
        ranks=server.ranks,
        network=server.network,
        memory_limit_bytes=server.memory_bytes,
        version=version,
        computed_on=server.computed_on,
        requested=requested,
        report=server.report,
    )
    evidence = LoadEvidence(
        model=model,
        canary=canary,
        profiles=tuple(measured),
        capacity=found,
        faults=None if survived is None else tuple(survived),
        metrics=measurements.all_metrics(server, measured, found, survived),
        models=measurements.by_model(tester.requests),
        memory=measurements.memory(server, measured, expected, unwatched),
        client=measurements.client_cost(tester.client),
        server=seen,
    )
    evidence = evidence.model_copy(update={"findings": measurements.findings(evidence)})
    measurements.write(folder, evidence, tester.requests, server.memory.samples)
    return evidence


def write_unhealthy(reason: str, plan: LoadPlan, folder: Path) -> LoadEvidence:
    """Write the evidence of a server that never became healthy, which the gate fails."""
    return _write_untested(plan, folder, died=reason)


def write_without_gpu(plan: LoadPlan, folder: Path) -> LoadEvidence:
    """Write the evidence of an image that needs a GPU on a machine that has none: nothing was measured."""
    lacking = "the image needs a GPU, and this machine has none: run the load test on a machine with a GPU"
    return _write_untested(plan, folder, lacking=lacking)


def write_unsupported(reason: str, plan: LoadPlan, folder: Path) -> LoadEvidence:
    """Write the evidence of a configuration that this device does not support: no server was started."""
    return _write_untested(plan, folder, lacking=reason, unsupported=True)


def add_speculation(folder: Path, evidence: LoadEvidence, speculation: Speculation) -> LoadEvidence:
    """Add to a load test's evidence in ``folder`` what speculation changed."""
    added = evidence.model_copy(update={"speculation": speculation})
    measurements.write_evidence(folder, added)
    return added


def _write_untested(
    plan: LoadPlan,
    folder: Path,
    *,
    died: str | None = None,
    lacking: str | None = None,
    unsupported: bool = False,
) -> LoadEvidence:
    limit = int(plan.memory.limit_bytes)
    evidence = LoadEvidence(
        model=None,
        canary=CanaryAnswer(**plan.known_canary().model_dump(), answer=None, error="it was not asked", ok=False),
        profiles=(),
        capacity=None,
        faults=None,
        metrics={},
        memory=MemoryResult(limit_bytes=limit),
        client=ClientCost(),
        lacking=lacking,
        unsupported=unsupported,
        server=ServerResult(died=died, start_seconds=None, cpus=plan.cpus, memory_limit_bytes=limit),
    )
    measurements.write(folder, evidence, [], [])
    return evidence


def _profile(tester: Tester, wanted: TrafficProfile, context: int | None, *, again: bool = False) -> ProfileResult:
    """Send one profile and measure it; a short one is sent twice if the load generator was late the first time."""
    profile = wanted if context is None else wanted.fitted(context)
    if profile is not wanted:
        tester.progress(f"`{wanted.name}` is too long for a context of {context} tokens: all its lengths are shortened")
    before, samples = scrape(tester.server.url), len(tester.server.memory.samples)
    traffic, requests = tester.drive(profile, profile.name)
    late = traffic.client_late_ms.get("p95", 0.0)
    if late > tester.plan.max_client_late_ms and profile.seconds <= _SHORT_SECONDS and not again:
        tester.progress(f"the load generator itself was late, {late:.0f} ms at p95: sending `{profile.name}` once more")
        return _profile(tester, wanted, context, again=True)
    after = scrape(tester.server.url)
    tester.requests += [request.model_copy(update={"profile": profile.name}) for request in requests]
    metrics = measurements.request_metrics(requests)
    if before is not None and after is not None:
        metrics |= after.since(before)
        metrics |= pool(tester.scrapes, requests, traffic.client.schedule_began or 0.0)
    leak = None
    if profile.leak_test:
        leak = measurements.leak(tester.server.memory.samples[samples:], profile)
    return ProfileResult(
        name=profile.name,
        requested=RequestedTraffic.of(profile),
        shortened=profile is not wanted,
        traffic=traffic,
        queue=queue(requests, profile.seconds) if requests else None,
        leak=leak,
        metrics=metrics,
    )


class _Died(Exception):
    """The server died during the search for its capacity; the verdict says so."""


def _capacity(tester: Tester, context: int | None) -> Capacity | None:
    """Search for the capacity under the first profile's lengths and arrivals; None where the server died meanwhile.

    If the rate of those arrivals changes over the time, the search is for the mean rate.
    """
    first, search = tester.plan.traffic[0], tester.plan.search
    assert search is not None  # noqa: S101 - the caller asked
    base = first if context is None else first.fitted(context)

    def send(rate: float, seconds: float) -> tuple[Sequence[RequestRecord], float]:
        own = {"rate": rate / base.arrivals.mean, "seed": base.seed + tester.drives}
        step = {**own, "seconds": seconds, "warmup_requests": 0}
        traffic, requests = tester.drive(TrafficProfile.model_validate({**dict(base), **step}), "capacity")
        if tester.server.died() is not None:
            raise _Died
        return requests, traffic.client_late_ms.get("p95", 0.0)

    try:
        return capacities.search(
            search, first.slo.limits(), base.mean_rate, send,
            max_client_late_ms=tester.plan.max_client_late_ms, progress=tester.progress,
        )  # fmt: skip
    except _Died:
        return None


def _served_models(server: Server) -> tuple[tuple[str, ...], int | None]:
    """The names of the served model and of its adapters, and its context in tokens if the server states it."""
    try:
        answer = httpx.get(f"{server.url}/v1/models", timeout=30, trust_env=False)
        served = answer.raise_for_status().json()["data"]
        return tuple(str(each["id"]) for each in served), served[0].get("max_model_len")
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        failure = server.failed()
        raise LoadError(
            f"the server {failure}" if failure else f"the server does not name its model: {error}"
        ) from error


def _version(server: Server) -> str | None:
    """The engine's version, if the server states it."""
    try:
        return str(httpx.get(f"{server.url}/version", timeout=10, trust_env=False).raise_for_status().json()["version"])
    except (httpx.HTTPError, ValueError, KeyError):
        return None


def _ask_canary(server: Server, model: str, plan: LoadPlan) -> CanaryAnswer:
    """Ask for the greedy continuation of the canary's prompt."""
    canary = plan.known_canary()
    # A token has at least one character.
    tokens = len(canary.expect)
    body = {"model": model, "prompt": canary.prompt, "max_tokens": tokens, "temperature": 0}
    answer, error = None, None
    try:
        reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=plan.request_timeout_s, trust_env=False)
        answer = str(reply.raise_for_status().json()["choices"][0]["text"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    ok = answer is not None and answer.startswith(canary.expect)
    return CanaryAnswer(**canary.model_dump(), answer=answer, error=error, ok=ok)
