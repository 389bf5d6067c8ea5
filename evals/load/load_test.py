"""The load test: does the image that will ship answer rightly, fast enough, without errors, in the memory it is given?

`measure` asks the canary, drives open-loop traffic through a worker, searches for the capacity and mistreats the server
where the plan says so, and writes ``load.json``; `judge` holds that against the model's limits.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt

from containers.sandbox.sandbox import Server
from evals.errors import EvaluationError
from evals.load import capacity as capacities
from evals.load import faults, measurements
from evals.load.engine_metrics import Scrape, pool, scrape
from evals.load.expected_memory import Expected
from evals.load.load_gate import GATE, is_conclusive, judge
from evals.load.plan import Canary, LoadPlan, Memory, load_key
from evals.load.slo import PERCENTILES, Slo, percentile
from evals.load.traffic.profile import TrafficProfile
from evals.load.traffic.schedule import plan as schedule_of
from evals.statistics.trend import queue
from registry import untrusted
from registry.errors import UntrustedFileError
from registry.progress import Progress

__all__ = [
    "GATE", "Canary", "LoadError", "LoadPlan", "Memory", "Slo", "is_conclusive", "judge", "load_key", "measure",
    "percentile", "write_unhealthy", "write_without_gpu",
]  # fmt: skip

Live = Callable[[Mapping[str, Any]], None]
RunWorker = Callable[[str, Path, Mapping[str, Any], Path], dict[str, Any]]

SCHEMA = "slipway/load/2"
_LIVE_SECONDS = 0.25
# The most bytes of a load generator's rows, some hundred each, and of what it says of its progress.
_ROWS_BYTES, _PROGRESS_BYTES = 1 << 30, 1 << 16
# An engine says how it is once a second, which costs it a few milliseconds.
_LOOKS_A_SCRAPE = 4
# Memory is watched for so long after the last answer: does it give back what it took?
_COOL_DOWN_SECONDS = 1.0
# A profile that takes no longer is sent again where the load generator was late: one hiccup of this machine, perhaps.
_SHORT_SECONDS = 60.0


class LoadProgress(BaseModel):
    """How a run of the load generator goes (`evals.load.traffic.client.Watch`): requests, seconds, milliseconds."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    phase: Literal["preparing", "warm-up", "load", "done"]
    total: NonNegativeInt
    answered: NonNegativeInt
    errors: NonNegativeInt
    elapsed_s: float
    tokens_per_second: float
    p50_latency_ms: NonNegativeFloat | None
    p95_latency_ms: NonNegativeFloat | None
    p95_ttft_ms: NonNegativeFloat | None


class LoadError(EvaluationError):
    """The load test could not be run; the message says why."""


@dataclass
class Tester:
    """What one load test works with: a healthy server in the sandbox, and what drives and hears it."""

    server: Server
    plan: LoadPlan
    model: str
    tokenizer: Path
    scratch: Path
    run_worker: RunWorker
    progress: Progress
    live: Live = lambda _: None
    rows: list[dict[str, Any]] = field(default_factory=list)
    prompts_used: int = 0
    drives: int = 0
    client: list[dict[str, Any]] = field(default_factory=list)
    scrapes: list[Scrape] = field(default_factory=list)

    def drive(self, profile: TrafficProfile, purpose: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Run a profile's traffic in the worker; return what it says of itself, and its rows."""
        self.drives += 1
        folder = self.scratch / str(self.drives)
        output = folder / "output"
        output.mkdir(parents=True)
        request = {
            "url": self.server.url, "model": self.model, "tokenizer": str(self.tokenizer.resolve()),
            "prompts": str(self.plan.prompts.resolve()), "schedule": schedule_of(profile).document(),
            "skip": self.prompts_used, "request_timeout_s": self.plan.request_timeout_s, "seed": self.plan.seed or 0,
            "output": str(output.resolve()),
        }  # fmt: skip
        script = Path(__file__).parent / "traffic" / "client.py"
        with self._watched(folder / "progress.json", purpose, profile.rate):
            told = self.run_worker("aiperf", script, request, folder)
        rows = [json.loads(line) for line in untrusted.read(output, "requests.jsonl", _ROWS_BYTES).splitlines()]
        self.prompts_used = told.pop("prompts_used", self.prompts_used)
        self.client.append(told.get("client", {}))
        late = [row["late_ms"] for row in rows if "late_ms" in row]
        return {
            **told,
            "requests": len(rows),
            "sent": len(late),
            "answered": sum(row["error"] is None for row in rows),
            "errors": dict(Counter(row["error"] for row in rows if row["error"] is not None)),
            "client_late_ms": {f"p{share}": percentile(late, share) for share in PERCENTILES} if late else {},
        }, rows

    @contextlib.contextmanager
    def _watched(self, file: Path, purpose: str, rate: float) -> Iterator[None]:
        """Pass on how the worker says that it goes, and label the memory's samples with its phase."""
        ended = threading.Event()
        self.scrapes.clear()

        def watch() -> None:
            looks = 0
            while not ended.wait(_LIVE_SECONDS):
                looks += 1
                if looks % _LOOKS_A_SCRAPE == 0 and (seen := scrape(self.server.url)):
                    self.scrapes.append(seen)
                with contextlib.suppress(OSError, ValueError, UntrustedFileError):
                    told = LoadProgress.model_validate_json(untrusted.read(file.parent, file.name, _PROGRESS_BYTES))
                    if told.phase in {"warm-up", "load"}:
                        self.server.memory.phase = told.phase
                    self.live({**told.model_dump(), "purpose": purpose, "rate": rate})

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.server.memory.phase = "after"


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
    expected: Expected | None = None,
) -> dict[str, Any]:
    """Put a healthy server under the plan's traffic and write what was seen into ``folder``.

    Writes ``load.json`` (the evidence, also returned), ``requests.jsonl`` (a row a request that was due, with its
    profile) and ``memory.json`` (the samples). A server that fails the canary gets no traffic.

    Args:
        server: the server, in the sandbox.
        plan: the traffic.
        tokenizer: the folder of the model's tokenizer.
        folder: where the evidence goes.
        scratch: an existing folder for the worker.
        run_worker: runs ``evals/load/traffic/client.py`` in the ``aiperf`` environment.
        progress: told what happens.
        live: told several times a second how the traffic goes, as the worker's ``progress.json`` has it.
        expected: what the server's memory should come to.

    Raises:
        LoadError: the server doesn't say what it serves.
    """
    model, context = _served_model(server)
    tester = Tester(server, plan, model, tokenizer, scratch, run_worker, progress, live)
    canary = _ask_canary(server, model, plan)
    measured: list[dict[str, Any]] = []
    found: dict[str, Any] | None = None
    survived: list[dict[str, Any]] | None = None
    if canary["ok"]:
        progress("the canary got the answer that it must")
        measured = [_profile(tester, profile, context) for profile in plan.traffic if server.died() is None]
        if plan.search is not None and server.died() is None:
            found = _capacity(tester, context)
        server.memory.phase = "cool-down"
        time.sleep(_COOL_DOWN_SECONDS)
    else:
        progress("the canary got another answer than it must: no traffic is sent")
    failure, version = server.failed(), _version(server)
    unwatched = server.memory.longest_gap()
    if plan.faults and canary["ok"] and failure is None:
        server.memory.phase = "faults"
        survived = faults.inflict(server, model, context, recovery_s=plan.max_recovery_s, progress=progress)
    server.memory.stop()
    evidence: dict[str, Any] = {
        "schema": SCHEMA,
        "model": model,
        "canary": canary,
        "profiles": measured,
        "capacity": found,
        "faults": survived,
        "metrics": measurements.all_metrics(server, measured, found, survived),
        "memory": measurements.memory(server, measured, expected, unwatched),
        "client": measurements.client_cost(tester.client),
        "server": {
            "died": None if failure is None else str(failure), "start_seconds": server.started_seconds,
            "cpus": server.cpus, "gpu": server.gpu, "network": server.network,
            "memory_limit_bytes": server.memory_bytes, "version": version,
            "computed_on": server.computed_on.model_dump(mode="json"),
        },
    }  # fmt: skip
    evidence["findings"] = measurements.findings(evidence)
    measurements.write(folder, evidence, tester.rows, server.memory.samples)
    return evidence


def write_unhealthy(reason: str, plan: LoadPlan, folder: Path) -> dict[str, Any]:
    """Write the evidence of a server that never got healthy, which is a failure of the release and not of the test."""
    return _write_untested(plan, folder, died=reason)


def write_without_gpu(plan: LoadPlan, folder: Path) -> dict[str, Any]:
    """Write the evidence of an image that needs a GPU where there is none: nothing is known of it."""
    lacking = "the image needs a GPU and this machine has none: run it on one that has"
    return _write_untested(plan, folder, lacking=lacking)


def _write_untested(
    plan: LoadPlan, folder: Path, *, died: str | None = None, lacking: str | None = None
) -> dict[str, Any]:
    evidence: dict[str, Any] = {
        "schema": SCHEMA, "model": None, "profiles": [], "capacity": None, "faults": None, "metrics": {},
        "canary": {**plan.canary.model_dump(), "answer": None, "error": "it was not asked", "ok": False},
        "memory": {
            "limit_bytes": int(plan.memory.limit_bytes), "source": None, "samples": 0, "peak": {},
            "unwatched_seconds": 0.0,
        },
        "client": {}, "findings": [], "lacking": lacking,
        "server": {
            "died": died, "start_seconds": None, "cpus": plan.cpus, "gpu": None, "network": None,
            "memory_limit_bytes": int(plan.memory.limit_bytes), "version": None,
        },
    }  # fmt: skip
    measurements.write(folder, evidence, [], [])
    return evidence


def _profile(tester: Tester, wanted: TrafficProfile, context: int | None, *, again: bool = False) -> dict[str, Any]:
    """Send one profile and say what came of it; a short one twice where the load generator was late the first time."""
    profile = wanted if context is None else wanted.fitted(context)
    if profile is not wanted:
        tester.progress(
            f"`{wanted.name}` is too long for a context of {context} tokens: all lengths are shortened alike"
        )
    before, samples = scrape(tester.server.url), len(tester.server.memory.samples)
    traffic, rows = tester.drive(profile, profile.name)
    late = traffic["client_late_ms"].get("p95", 0.0)
    if late > tester.plan.max_client_late_ms and profile.seconds <= _SHORT_SECONDS and not again:
        tester.progress(f"the load generator itself was late, {late:.0f} ms at p95: sending `{profile.name}` once more")
        return _profile(tester, wanted, context, again=True)
    after = scrape(tester.server.url)
    tester.rows += [{"profile": profile.name, **row} for row in rows]
    metrics = measurements.request_metrics(rows)
    if before is not None and after is not None:
        metrics |= after.since(before)
        metrics |= pool(tester.scrapes, rows, traffic.get("client", {}).get("schedule_began", 0.0))
    leak = None
    if profile.leak_test:
        leak = measurements.leak(tester.server.memory.samples[samples:], profile)
    return {
        "name": profile.name,
        "requested": {**profile.model_dump(mode="json", exclude={"slo"}), "requests": profile.requests},
        "shortened": profile is not wanted,
        "traffic": traffic,
        "queue": queue(rows, profile.seconds).document() if rows else None,
        "leak": leak,
        "metrics": metrics,
    }


class _Died(Exception):
    """The server died while its capacity was searched for, which the verdict says."""


def _capacity(tester: Tester, context: int | None) -> dict[str, Any] | None:
    """Search for the capacity under the first profile's lengths and arrivals; None where the server died of it.

    Where those arrivals change their rate over the time, it is the mean rate that is searched for.
    """
    first, search = tester.plan.traffic[0], tester.plan.search
    assert search is not None  # noqa: S101 - the caller asked
    base = first if context is None else first.fitted(context)

    def load(rate: float, seconds: float) -> tuple[list[dict[str, Any]], float]:
        own = {"rate": rate / base.arrivals.mean, "seed": base.seed + tester.drives}
        step = {**own, "seconds": seconds, "warmup_requests": 0}
        traffic, rows = tester.drive(TrafficProfile.model_validate({**dict(base), **step}), "capacity")
        if tester.server.died() is not None:
            raise _Died
        return rows, traffic["client_late_ms"].get("p95", 0.0)

    try:
        return capacities.search(
            search, first.slo.limits(), base.mean_rate, load,
            max_client_late_ms=tester.plan.max_client_late_ms, progress=tester.progress,
        )  # fmt: skip
    except _Died:
        return None


def _served_model(server: Server) -> tuple[str, int | None]:
    """The name that the server has for its model, and its context in tokens, where it tells."""
    try:
        answer = httpx.get(f"{server.url}/v1/models", timeout=30, trust_env=False)
        served = answer.raise_for_status().json()["data"][0]
        return str(served["id"]), served.get("max_model_len")
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        failure = server.failed()
        raise LoadError(f"the server {failure}" if failure else f"the server names no model: {error}") from error


def _version(server: Server) -> str | None:
    """The engine's own version, where it tells one."""
    try:
        return str(httpx.get(f"{server.url}/version", timeout=10, trust_env=False).raise_for_status().json()["version"])
    except (httpx.HTTPError, ValueError, KeyError):
        return None


def _ask_canary(server: Server, model: str, plan: LoadPlan) -> dict[str, Any]:
    """Ask for the greedy continuation of the canary's prompt."""
    # No token is shorter than a character.
    tokens = len(plan.canary.expect)
    body = {"model": model, "prompt": plan.canary.prompt, "max_tokens": tokens, "temperature": 0}
    answer, error = None, None
    try:
        reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=plan.request_timeout_s, trust_env=False)
        answer = str(reply.raise_for_status().json()["choices"][0]["text"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    ok = answer is not None and answer.startswith(plan.canary.expect)
    return {**plan.canary.model_dump(), "answer": answer, "error": error, "ok": ok}
