"""The load test's plan, its arrivals, its canary, and its verdict."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import load_evidence
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scripted_server import Script, serving

from containers.hardware.core_pool import Cores
from containers.sandbox.engine_log import Failure
from containers.sandbox.memory import MemorySampler
from containers.sandbox.sandbox import Server
from evals.errors import LoadEvidenceError
from evals.load import load_test as loads
from evals.load.capacity import Capacity, CapacityStep, Status
from evals.load.evidence import LoadEvidence, parse_load_evidence, read_load_evidence
from evals.load.load_test import (
    LoadPlan,
    is_conclusive,
    judge,
    load_key,
    measure,
    percentile,
    write_unhealthy,
    write_unsupported,
    write_without_gpu,
)
from evals.load.plan import UnknownCanaryError
from evals.load.requests import RequestRecord, format_requests, read_requests
from evals.workers import RunWorker

GIB = 2**30
LIMITS = {"p95_latency_ms": 500, "p95_ttft_ms": 200, "error_rate": 0.01, "min_output_tokens_per_second": 50}


def plan(**changes: object) -> LoadPlan:
    return LoadPlan.model_validate({
        "prompts": "heldout.jsonl",
        "request_rate": 2,
        "seconds": 20,
        "canary": {"prompt": "if __name__ == ", "expect": "the"},
        "slo": LIMITS,
        "memory": {"limit_bytes": "4GiB", "headroom": 0.25},
        **changes,
    })  # fmt: skip


def evidence(
    *,
    canary: Mapping[str, Any] | None = None,
    died: str | None = None,
    traffic: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    others: Iterable[Mapping[str, Any]] = (),
    **changes: Any,  # noqa: ANN401 - JSON
) -> LoadEvidence:
    """A real load test with these changes, at its limits where nothing is said."""
    good_metrics: dict[str, Any] = {
        "p95_latency_ms": 500.0, "p95_ttft_ms": 10.0, "error_rate": 0.0, "output_tokens_per_second": 50.0,
        "peak_memory_bytes": 3.0 * GIB,
    }  # fmt: skip
    found = load_evidence.changed(
        load_evidence.measured(), {"canary": canary or {}, "server": {"died": died}, **changes}
    )
    (profile,) = found.profiles
    measured = {**good_metrics, **(metrics or {})}
    return found.model_copy(
        update={
            "metrics": {name: value for name, value in measured.items() if value is not None},
            "profiles": tuple(
                profile.model_copy(update={"traffic": profile.traffic.model_copy(update=each)})
                for each in (traffic or {}, *others)
            ),
        }
    )


def without_profiles(found: LoadEvidence) -> LoadEvidence:
    return found.model_copy(update={"profiles": ()})


def test_what_meets_every_limit_exactly_passes_and_names_each() -> None:
    verdict = judge(evidence(), plan())
    assert verdict.status == "pass"
    assert set(verdict.limits) == {
        "p95_latency_ms", "p95_ttft_ms", "error_rate", "output_tokens_per_second", "peak_memory_bytes",
    }  # fmt: skip
    assert all(name in verdict.reason for name in verdict.limits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("p95_latency_ms", math.nextafter(500.0, math.inf)),
        ("p95_ttft_ms", 200.0001),
        ("error_rate", 0.025),
        ("output_tokens_per_second", math.nextafter(50.0, 0)),
        ("peak_memory_bytes", 3.0 * GIB + 1),
    ],
)
def test_a_limit_missed_by_a_hair_fails_by_name(name: str, value: float) -> None:
    verdict = judge(evidence(metrics={name: value}), plan())
    assert verdict.status == "fail"
    assert verdict.reason.startswith(name)
    assert verdict.metrics[name] == value


def test_each_gpu_is_held_to_its_own_memory_and_named() -> None:
    gpus = [{"uuid": f"GPU-{number}", "total_bytes": 80 * GIB, "peak_bytes": 76 * GIB} for number in range(2)]
    seen = {"gpu_0_peak_bytes": 0.98 * 80 * GIB, "gpu_1_peak_bytes": 0.98 * 80 * GIB}
    assert judge(evidence(memory={"gpus": gpus}, metrics=seen), plan()).status == "pass"
    over = judge(evidence(memory={"gpus": gpus}, metrics={**seen, "gpu_1_peak_bytes": 79 * GIB}), plan())
    assert (over.status, over.reason) == ("fail", "gpu_1_peak_bytes 79.00 GiB > 78.40 GiB (GPU-1)")
    unseen = judge(evidence(memory={"gpus": gpus}, metrics={"gpu_0_peak_bytes": GIB}), plan())
    assert unseen.reason == "gpu_1_peak_bytes could not be measured (limit 78.40 GiB) (GPU-1)"


@pytest.mark.parametrize("name", ["p95_latency_ms", "error_rate", "output_tokens_per_second", "peak_memory_bytes"])
def test_a_metric_that_is_missing_fails(name: str) -> None:
    verdict = judge(evidence(metrics={name: None}), plan())
    assert (verdict.status, "could not be measured" in verdict.reason) == ("fail", True)


def test_a_canary_that_fp16_gave_fails_with_its_margin() -> None:
    canary = {"prompt": "if", "expect": "right", "margin": 4.25, "answer": "wrong", "ok": False}
    verdict = judge(without_profiles(evidence(canary=canary)), plan())
    assert "must begin with 'right', which FP16 prefers by 4.25 nats, but the server answered 'wrong'" in verdict.reason


def test_a_plan_without_a_canary_says_where_one_comes_from() -> None:
    with pytest.raises(UnknownCanaryError, match="the first `slipway release` takes one from FP16's answers"):
        plan(canary=None).known_canary()


def test_a_wrong_canary_fails_and_shows_both_texts() -> None:
    canary = {"prompt": "if", "expect": "right", "answer": "wrong", "ok": False}
    verdict = judge(without_profiles(evidence(canary=canary)), plan())
    assert verdict.status == "fail"
    assert "'right'" in verdict.reason
    assert "'wrong'" in verdict.reason


def test_a_dead_server_fails_and_says_how_it_died() -> None:
    verdict = judge(evidence(died="ran out of memory (limit 4.00 GiB)"), plan())
    assert (verdict.status, "ran out of memory" in verdict.reason) == ("fail", True)


@pytest.mark.parametrize(
    ("traffic", "cause"),
    [
        ({"client_late_ms": {"p95": 250.1}}, "client-late"),
        ({"sent": 39}, "incomplete"),
        ({"is_complete": False}, "incomplete"),
        ({"requests": 39, "sent": 39}, "incomplete"),
    ],
)
def test_other_traffic_than_asked_for_is_inconclusive(traffic: dict[str, Any], cause: str) -> None:
    verdict = judge(evidence(traffic=traffic), plan())
    assert (verdict.status, verdict.cause, verdict.blocks) == ("inconclusive", cause, True)
    accepting = plan(accept_inconclusive={cause: "a shared machine"})
    assert judge(evidence(traffic=traffic), accepting).accepted_because == "a shared machine"


def test_a_late_client_explains_latency_but_no_errors() -> None:
    late = {"client_late_ms": {"p95": 900.0}}
    assert judge(evidence(traffic=late, metrics={"p95_latency_ms": 900.0}), plan()).status == "inconclusive"
    assert judge(evidence(traffic=late, metrics={"error_rate": 0.5}), plan()).status == "fail"


def test_a_late_client_explains_throughput_too() -> None:
    late = {"client_late_ms": {"p95": 900.0}}
    slow = {"output_tokens_per_second": 30.0, "p95_latency_ms": 900.0}
    assert judge(evidence(traffic=late, metrics=slow), plan()).cause == "client-late"
    assert judge(evidence(traffic=late, metrics={"peak_memory_bytes": 3.9 * GIB}), plan()).status == "fail"


def test_requests_that_never_went_out_are_no_errors_of_the_server() -> None:
    lost = {"sent": 30, "answered": 30}
    assert judge(evidence(traffic=lost, metrics={"error_rate": 0.25}), plan()).cause == "incomplete"
    refused = {"sent": 30, "answered": 25}
    verdict = judge(evidence(traffic=refused, metrics={"error_rate": 0.375}), plan())
    assert (verdict.status, verdict.reason.startswith("error_rate")) == ("fail", True)


def searched(rate: float | None, failing: float | None, last: Status, *, conclusive: bool = False) -> Capacity:
    steps: list[CapacityStep] = [load_evidence.step(rate or 1.0, last)]
    return load_evidence.searched(rate, failing, steps, conclusive=conclusive)


@pytest.mark.parametrize(
    ("capacity", "status", "cause"),
    [
        (searched(4.0, None, "unclear"), "inconclusive", "client-late"),
        (searched(None, None, "unclear"), "inconclusive", "client-late"),
        (searched(4.0, 64.0, "unclear"), "inconclusive", "client-late"),
        (searched(4.0, None, "holds"), "inconclusive", "incomplete"),
        (searched(4.0, 9.0, "unclear"), "fail", None),
        (searched(4.0, 14.0, "holds", conclusive=True), "fail", None),
        (searched(None, 0.5, "misses"), "fail", None),
        (searched(32.0, None, "unclear"), "pass", None),
    ],
)
def test_a_capacity_that_the_client_could_not_drive_to_is_inconclusive_and_not_kept(
    capacity: Capacity, status: str, cause: str | None
) -> None:
    held = plan(slo={**LIMITS, "min_capacity_requests_per_second": 12})
    found = capacity.requests_per_second
    metrics = {} if found is None else {"capacity_requests_per_second": found}
    seen = evidence(metrics=metrics).model_copy(update={"capacity": capacity})
    verdict = judge(seen, held)
    assert (verdict.status, verdict.cause) == (status, cause)
    assert is_conclusive(seen, held) == (status != "inconclusive")


def test_memory_that_nobody_watched_is_inconclusive() -> None:
    gap = {"unwatched_seconds": 31.0}
    for peak in (3.0 * GIB, None):
        verdict = judge(evidence(metrics={"peak_memory_bytes": peak}, memory=gap), plan())
        assert (verdict.status, verdict.cause) == ("inconclusive", "memory-unwatched")
    assert judge(evidence(metrics={"peak_memory_bytes": 3.9 * GIB}, memory=gap), plan()).status == "fail"
    assert judge(evidence(metrics={"p95_latency_ms": 9e9}, memory=gap), plan()).status == "fail"


def test_an_image_without_the_gpu_that_it_needs_is_inconclusive_and_tried_again(tmp_path: Path) -> None:
    found = write_without_gpu(plan(), tmp_path)
    verdict = judge(found, plan())
    assert (verdict.status, verdict.cause, verdict.blocks) == ("inconclusive", "no-gpu", True)
    assert not is_conclusive(found, plan())
    assert read_load_evidence(tmp_path) == found


def test_a_container_lives_as_long_as_the_slowest_search(tmp_path: Path) -> None:
    slow = plan(request_rate=0.05, seconds=400, capacity={"max_steps": 4}, prompts=tmp_path)
    # A hundred requests at that rate, at half of it, at a quarter, at an eighth.
    assert slow.lifetime_s > sum(100 / (0.05 / 2**step) for step in range(4))


def test_only_what_the_next_run_would_see_again_is_worth_keeping() -> None:
    assert is_conclusive(evidence(), plan())
    assert is_conclusive(evidence(metrics={"p95_latency_ms": 9e9}), plan())
    assert is_conclusive(without_profiles(evidence(canary={"ok": False})), plan())
    assert not is_conclusive(evidence(died="ended with status 137"), plan())
    assert not is_conclusive(evidence(traffic={"client_late_ms": {"p95": 999.0}}), plan())
    assert not is_conclusive(without_profiles(evidence(canary={"ok": False, "error": "ReadTimeout"})), plan())


def test_a_plan_without_limits_still_judges_errors_and_memory() -> None:
    verdict = judge(evidence(), plan(slo={}))
    assert (verdict.status, set(verdict.limits)) == ("pass", {"error_rate", "peak_memory_bytes"})


@pytest.mark.parametrize(
    "changes",
    [
        {"sloo": {}},
        {"slo": {"p95_latncy_ms": 1}},
        {"slo": {"p95_latency_ms": -1}},
        {"slo": {"p95_latency_ms": math.inf}},
        {"request_rate": 0},
        {"request_rate": 0.01},
        {"profiles": ["chatt"]},
        {"profiles": []},
        {"profiles": {"chat": {"rate": 1}}},
        {"capacity": {"step_second": 1}},
        {"canary": {"prompt": "x", "expect": ""}},
        {"memory": {"limit_bytes": "much"}},
        {"memory": {"limit_bytes": 1, "headroom": 1}},
        {"accept_inconclusive": {"client-lat": "why"}},
    ],
)
def test_a_misspelt_plan_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        plan(**changes)


def test_only_what_is_measured_is_in_the_key() -> None:
    assert load_key(plan()) == load_key(plan(slo={}, memory={"limit_bytes": 4 * GIB, "headroom": 0.9}, prompts="other"))
    assert load_key(plan()) != load_key(plan(memory={"limit_bytes": "5GiB"}))
    assert load_key(plan()) != load_key(plan(request_rate=3))
    json.dumps(load_key(plan()))


@given(st.lists(st.floats(0, 1e6), min_size=1), st.sampled_from([50, 90, 95, 99]))
def test_a_percentile_is_the_least_value_that_enough_values_do_not_exceed(values: list[float], share: int) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share / 100 * len(values)
    assert sum(value < found for value in values) < share / 100 * len(values)


@pytest.fixture
def server() -> Iterator[Callable[..., Server]]:
    """Make a Server of a URL, whose memory is always 1 GiB."""
    samplers: list[MemorySampler] = []

    def make(url: str, died: Failure | None = None) -> Server:
        sampler = MemorySampler(lambda: {"memory_bytes": GIB}, "test", interval=0.01)
        samplers.append(sampler)
        sampler.start()
        return Server(url, 1.5, 4 * GIB, None, sampler, lambda: died)

    yield make
    for sampler in samplers:
        sampler.stop()


RESULT = loads.ClientResult(
    aiperf_version="0", exit_status=0, is_complete=True, warmup_errors=(), prompts_used=40, client=loads.ClientCost()
)  # fmt: skip


def fake_worker(*drives: list[RequestRecord]) -> RunWorker:
    """Gives the records of one drive after the other, and of the last for ever."""
    waiting = list(drives)

    def run(_environment: str, _script: Path, request: Mapping[str, object], _folder: Path) -> dict[str, object]:
        records = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        Path(str(request["output"]), "requests.jsonl").write_text(format_requests(records))
        return RESULT.model_dump(mode="json")

    return run


def good(number: int, latency: float) -> RequestRecord:
    due = 10 * number
    return RequestRecord(
        number=number, due_ms=due, start_ms=due + 1.0, late_ms=1.0, latency_ms=latency, ttft_ms=latency / 2,
        tpot_ms=1.0, end_ms=due + latency, input_tokens=4, output_tokens=8, error=None,
    )  # fmt: skip


def run_measure(folder: Path, made: Server, load: LoadPlan, *drives: list[RequestRecord]) -> LoadEvidence:
    scratch, output = folder / "scratch", folder / "evidence"
    scratch.mkdir()
    output.mkdir()
    return measure(
        made, load, tokenizer=folder, folder=output, scratch=scratch, run_worker=fake_worker(*drives), progress=print
    )


def test_measure_counts_latency_errors_and_memory(tmp_path: Path, server: Callable[..., Server]) -> None:
    rows = [good(number, 100.0 + number) for number in range(39)]
    rows.append(RequestRecord(number=39, due_ms=390, start_ms=391, late_ms=1, error="500 Internal Server Error"))
    with serving(Script()) as (url, _):
        found = run_measure(tmp_path, server(url), plan(), rows)
    assert found.canary.ok
    assert found.metrics["p95_latency_ms"] == 137.0
    assert found.metrics["error_rate"] == 1 / 40
    assert found.metrics["peak_memory_bytes"] == GIB
    assert found.metrics["start_seconds"] == 1.5
    # From the first request's start, 1 ms, to the last good answer, due at 380 ms and 138 ms later.
    assert found.metrics["output_tokens_per_second"] == pytest.approx(39 * 8 / 0.517)
    assert found.profiles[0].traffic.errors == {"500 Internal Server Error": 1}
    assert read_load_evidence(tmp_path / "evidence") == found
    assert {sample["phase"] for sample in json.loads((tmp_path / "evidence" / "memory.json").read_text())} >= {"after"}
    assert judge(found, plan(slo={})).reason == "error_rate 2.50% > 0.00%"


def test_where_the_generator_was_late_a_short_profile_is_sent_once_more(
    tmp_path: Path, server: Callable[..., Server]
) -> None:
    punctual = [good(number, 100.0) for number in range(40)]
    late = [row.model_copy(update={"late_ms": 999.0, "latency_ms": 1099.0}) for row in punctual]
    with serving(Script()) as (url, _):
        for name, drives in (("saved", (late, punctual)), ("lost", (late, late, punctual))):
            (tmp_path / name).mkdir()
            found = run_measure(tmp_path / name, server(url), plan(slo={}), *drives)
            assert {request.profile for request in read_requests(tmp_path / name / "evidence")} == {"quick"}
            assert len(read_requests(tmp_path / name / "evidence")) == 40
            assert is_conclusive(found, plan(slo={})) == (name == "saved")


def test_the_capacity_under_bursts_is_their_mean_rate(tmp_path: Path, server: Callable[..., Server]) -> None:
    sent: list[int] = []

    def punctual(_environment: str, _script: Path, request: Mapping[str, Any], _folder: Path) -> dict[str, object]:
        due = [each["due_ms"] for each in request["schedule"]["requests"]]
        sent.append(len(due))
        rows = [
            good(0, 20.0).model_copy(update={"due_ms": at, "start_ms": at, "end_ms": at + 20.0, "late_ms": 0.0})
            for at in due
        ]
        Path(request["output"], "requests.jsonl").write_text(format_requests(rows))
        return RESULT.model_dump(mode="json")

    search = {"max_steps": 2, "step_seconds": 40, "min_requests": 20}
    bursts = plan(profiles=["burst"], request_rate=2, seconds=40, capacity=search, slo={})
    (tmp_path / "evidence").mkdir()
    with serving(Script()) as (url, _):
        found = measure(
            server(url), bursts, tokenizer=tmp_path, folder=tmp_path / "evidence", scratch=tmp_path,
            run_worker=punctual, progress=print,
        ).capacity  # fmt: skip
    assert found is not None
    assert [step.rate for step in found.steps] == pytest.approx([count / 40 for count in sent[1:]], rel=0.01)
    assert found.requests_per_second == pytest.approx(sent[2] / 40, rel=0.01)


def test_a_server_that_says_something_else_gets_no_traffic(tmp_path: Path, server: Callable[..., Server]) -> None:
    def refuse(*_: object) -> dict[str, object]:
        raise AssertionError("no traffic was to be sent")

    (tmp_path / "evidence").mkdir()
    with serving(Script(text="something else")) as (url, _):
        found = measure(
            server(url), plan(), tokenizer=tmp_path, folder=tmp_path / "evidence", scratch=tmp_path,
            run_worker=refuse, progress=print,
        )  # fmt: skip
    verdict = judge(found, plan())
    assert (verdict.status, "something else" in verdict.reason) == ("fail", True)


@pytest.mark.parametrize("shared", [False, True])
def test_that_other_servers_had_its_cores_too_is_a_finding(
    tmp_path: Path, server: Callable[..., Server], shared: bool
) -> None:
    with serving(Script()) as (url, _):
        made = server(url)
        made.cores = Cores((0, 1), shared=shared)
        found = run_measure(tmp_path, made, plan(), [good(number, 100.0) for number in range(40)])
    assert all("shared its cores" in finding for finding in found.findings)
    assert bool(found.findings) == shared


def test_a_server_that_died_under_load_is_told_from_a_slow_one(tmp_path: Path, server: Callable[..., Server]) -> None:
    rows = [RequestRecord(number=number, due_ms=10 * number, error="ClientConnectorError") for number in range(40)]
    with serving(Script()) as (url, _):
        found = run_measure(tmp_path, server(url, Failure("ended with status 137")), plan(), rows)
    verdict = judge(found, plan())
    assert (verdict.status, verdict.reason) == ("fail", "during the load test the server ended with status 137")


def test_what_the_time_per_token_was_called_first_still_names_it() -> None:
    assert plan(slo={"p95_inter_token_ms": 5}).limits()["p95_tpot_ms"] == 5


def test_a_profile_brings_limits_and_the_models_file_has_the_last_word() -> None:
    changed = plan(profiles={"chat": {"slo": {"p95_latency_ms": 900}}, "rag": {}}, slo={"p95_ttft_ms": 100})
    limits = changed.limits()
    assert plan(profiles=["chat"], slo={}).limits()["p95_latency_ms"] == 500
    assert (limits["p95_latency_ms"], limits["p95_ttft_ms"]) == (900, 100)
    assert (limits["rag.p95_latency_ms"], limits["rag.p95_ttft_ms"]) == (6000, 100)
    assert "rag.start_seconds" not in plan(profiles=["chat", "rag"], slo={"start_seconds": 9}).limits()


def test_every_profile_must_have_been_sent_whole() -> None:
    two = plan(profiles={"quick": {}, "burst": {}}, slo={})
    sent = {"requests": two.traffic[1].requests, "sent": two.traffic[1].requests}
    metrics = dict.fromkeys(two.limits(), 0.0)
    assert judge(evidence(metrics=metrics, others=[sent]), two).status == "pass"
    assert judge(evidence(metrics=metrics), two).cause == "incomplete"
    late = {**sent, "client_late_ms": {"p95": 999.0}}
    assert "`burst`" in judge(evidence(metrics=metrics, others=[late]), two).reason


def test_a_limit_of_a_further_profile_fails_by_its_name() -> None:
    two = plan(profiles={"quick": {}, "burst": {}}, slo={})
    sent = {"requests": two.traffic[1].requests, "sent": two.traffic[1].requests}
    metrics = {**dict.fromkeys(two.limits(), 0.0), "burst.p95_latency_ms": 5001.0}
    assert judge(evidence(metrics=metrics, others=[sent]), two).reason == "burst.p95_latency_ms 5,001.0 ms > 5,000.0 ms"


def test_a_leak_and_a_fault_are_told_by_what_they_are() -> None:
    soak = plan(profiles=["soak"], slo={"p95_latency_ms": 1e9, "p99_latency_ms": 1e9}, faults=True)
    leaking = {"leak_bytes_per_request": 2.0**20, "faults_failed": 1.0, "p99_latency_ms": 1.0}
    failed = {"name": "malformed JSON", "must": "HTTP 400", "seen": "HTTP 500", "ok": False}
    verdict = judge(evidence(metrics=leaking, faults=[failed]), soak)
    assert verdict.status == "fail"
    assert "memory leaks: at least 1.000 MiB a request > 0.062 MiB a request" in verdict.reason
    assert "faults not survived: malformed JSON (HTTP 500)" in verdict.reason


def test_a_server_that_never_got_healthy_fails_the_gate_and_is_tried_again(tmp_path: Path) -> None:
    found = write_unhealthy("the server was not healthy within 5 s", plan(), tmp_path)
    verdict = judge(found, plan())
    assert (verdict.status, verdict.reason.splitlines()[0]) == (
        "fail", "the server never became healthy: the server was not healthy within 5 s",
    )  # fmt: skip
    assert not is_conclusive(found, plan())
    assert read_load_evidence(tmp_path) == found


def test_a_load_generators_result_in_another_form_is_an_error(tmp_path: Path, server: Callable[..., Server]) -> None:
    def broken(_environment: str, _script: Path, request: Mapping[str, object], _folder: Path) -> dict[str, object]:
        Path(str(request["output"]), "requests.jsonl").touch()
        return {**RESULT.model_dump(mode="json"), "exit_status": "fine"}

    with serving(Script()) as (url, _), pytest.raises(loads.LoadError, match="`exit_status`"):
        measure(
            server(url), plan(), tokenizer=tmp_path, folder=tmp_path, scratch=tmp_path, run_worker=broken,
            progress=print,
        )  # fmt: skip


def test_evidence_from_before_a_server_could_have_several_gpus_is_read() -> None:
    document = json.loads(load_evidence.measured().format())
    for part in (document["server"], document["server"]["computed_on"]):
        del part["gpus"]
        part["gpu"] = "GPU-1"
    del document["server"]["ranks"], document["memory"]["gpus"]
    server = parse_load_evidence(json.dumps(document), "load.json").server
    assert server.computed_on is not None
    assert (server.gpus, server.computed_on.gpus, server.ranks) == (("GPU-1",), ("GPU-1",), 1)


def test_evidence_of_a_real_release_is_read_and_written_without_a_loss() -> None:
    found = load_evidence.measured()
    assert parse_load_evidence(found.format(), "load.json") == found
    assert judge(found, plan(request_rate=4, seconds=10)).status == "pass"
    kept = json.loads(found.format())
    assert json.loads((load_evidence.FOLDER / "load.json").read_text()).items() <= {
        **kept, "client": {name: value for name, value in kept["client"].items() if value is not None},
    }.items()  # fmt: skip


def test_evidence_of_an_early_release_is_read_with_its_former_names() -> None:
    early = json.loads((load_evidence.FOLDER / "load.json").read_text())
    for part in (early, early["profiles"][0]):
        part["metrics"] = {name.replace("tpot", "inter_token"): value for name, value in part["metrics"].items()}
    del early["server"]["computed_on"], early["memory"]["unwatched_seconds"]
    found = parse_load_evidence(json.dumps(early), "load.json")
    assert found.metrics == load_evidence.measured().metrics
    assert found.server.computed_on is None


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"schema": "slipway/load/3"}'])
def test_evidence_that_can_not_be_read_names_its_file(tmp_path: Path, broken: str) -> None:
    (tmp_path / "load.json").write_text(broken)
    with pytest.raises(LoadEvidenceError, match=r"load\.json.*run the load test again"):
        read_load_evidence(tmp_path)


def test_the_limits_steer_a_search_for_the_capacity_and_so_belong_to_its_key() -> None:
    assert load_key(plan(capacity={})) != load_key(plan(capacity={}, slo={"p95_latency_ms": 400}))
    assert plan(slo={"min_capacity_requests_per_second": 10}).search is not None
    assert plan().search is None


def test_a_load_generators_progress_in_another_form_is_left_out_and_the_next_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loads, "_LIVE_SECONDS", 0.01)
    sampler = MemorySampler(dict, "none")
    going = {
        "phase": "load", "total": 8, "answered": 3, "errors": 0, "elapsed_s": 1.5, "tokens_per_second": 9.0,
        "p50_latency_ms": 20.0, "p95_latency_ms": 30.0, "p95_ttft_ms": None,
    }  # fmt: skip
    seen: list[loads.TrafficProgress] = []
    server = Server("http://127.0.0.1:9", 1.0, GIB, None, sampler, lambda: None)
    tester = loads.Tester(server, plan(), ("m",), tmp_path, tmp_path, lambda *_: {}, print, seen.append)
    with tester._watched(tmp_path / "progress.json", "quick", 2.0):
        for wrong in ({**going, "purpose": "[red]"}, {**going, "answered": "[red]3"}, {**going, "phase": 1}, ["load"]):
            (tmp_path / "progress.json").write_text(json.dumps(wrong))
            time.sleep(0.05)
        (tmp_path / "progress.json").write_text(json.dumps(going))
        deadline = time.monotonic() + 30
        while not seen and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sampler.phase == "load"
    assert seen
    assert all(each.model_dump() == {**going, "purpose": "quick", "rate": 2.0} for each in seen)


def test_a_setting_that_the_engine_did_not_apply_fails_and_is_named() -> None:
    report = {"configuration": {"dtype": "bfloat16", "max_seq_len": "1024"}, "kv_cache": "bfloat16"}
    asked = {"arguments": ["--max-model-len", "1024", "--kv-cache-dtype", "fp8"]}
    verdict = judge(evidence(server={"died": None, "requested": asked, "report": report}), plan())
    assert verdict.status == "fail"
    assert verdict.reason == (
        "the engine did not apply what was requested: a KV cache of fp8 was requested, and the engine's is bfloat16"
    )
    asked = {"arguments": ["--max-model-len", "1024"]}
    assert judge(evidence(server={"died": None, "requested": asked, "report": report}), plan()).status == "pass"


def test_speculation_that_changes_single_answers_fails() -> None:
    equal = {"answers": 24, "equal": 24}
    rates = dict.fromkeys(("single_tokens_per_second", "batched_tokens_per_second"), 50.0)
    found = {
        "method": "ngram", "tokens": 4, "single": equal, "batched": equal, "noise": equal, "drafted": 9, "accepted": 3,
        **rates, **{f"{name}_without": value for name, value in rates.items()},
    }  # fmt: skip
    assert judge(evidence(speculation=found), plan()).status == "pass"
    other = {**equal, "equal": 23, "first_difference": {"prompt": 3, "token": 7, "first": 1, "second": 2}}
    verdict = judge(evidence(speculation={**found, "single": other}), plan())
    assert verdict.status == "fail"
    assert "speculation changes greedy answers: one request at a time, 1 of 24 answers differ" in verdict.reason


def test_an_unsupported_configuration_is_inconclusive_and_can_not_be_accepted(tmp_path: Path) -> None:
    found = write_unsupported("`kv_cache: fp8` needs AVX-512", plan(), tmp_path)
    verdict = judge(found, plan(accept_inconclusive={"no-gpu": "tested elsewhere"}))
    assert (verdict.status, verdict.cause, verdict.blocks) == ("inconclusive", "unsupported", True)
    assert read_load_evidence(tmp_path) == found
