"""The load test with the real aiperf, held against servers whose behaviour is known."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from queues import served
from scripted_server import Script, serving

from containers.sandbox.engine_log import Failure
from containers.sandbox.memory import MemorySampler
from containers.sandbox.sandbox import Server
from evals.load.evidence import LoadEvidence
from evals.load.load_test import LoadPlan, TrafficProgress, judge, measure, percentile
from evals.load.requests import RequestRecord, read_requests
from pipeline.errors import WorkerFailed
from pipeline.workers.runner import Workers

RATE, SECONDS, TOKENS = 8, 5, 8
Measure = Callable[..., tuple[LoadEvidence, list[RequestRecord]]]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of one token a character, and modules of the standard library as prompts."""
    folder = tmp_path_factory.mktemp("text")
    vocabulary = {chr(code): code for code in range(128)}
    tokenizer: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "post_processor": None, "decoder": None, "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "?"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("a*.py"))
    rows = [json.dumps({"text": module.read_text().encode("ascii", "ignore").decode()}) for module in modules]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    return folder


def plan(text: Path, **changes: object) -> LoadPlan:
    return LoadPlan.model_validate({
        "prompts": text / "prompts.jsonl", "request_rate": RATE, "seconds": SECONDS, "input_tokens": 48,
        "output_tokens": TOKENS, "warmup_requests": 4, "request_timeout_s": 15,
        "canary": {"prompt": "once", "expect": "the"}, "memory": {"limit_bytes": "1GiB"},
        "slo": {"p95_latency_ms": 1000, "p95_ttft_ms": 1000}, **changes,
    })  # fmt: skip


@pytest.fixture
def run(text: Path, tmp_path: Path, run_worker: Workers) -> Measure:
    """Measure a scripted server under the plan; give the evidence and the rows."""

    def measured(script: Script, load: LoadPlan) -> tuple[LoadEvidence, list[RequestRecord]]:
        (tmp_path / "evidence").mkdir()
        (tmp_path / "scratch").mkdir()
        with serving(script) as (url, process):
            sampler = MemorySampler(lambda: {"memory_bytes": 1 << 20}, "test")
            sampler.start()

            def ended() -> Failure | None:
                return None if process.poll() is None else Failure(f"ended with status {process.returncode}")

            server = Server(url, 1.0, 1 << 30, None, sampler, ended)
            evidence = measure(
                server, load, tokenizer=text, folder=tmp_path / "evidence", scratch=tmp_path / "scratch",
                run_worker=run_worker, progress=print,
            )  # fmt: skip
        return evidence, read_requests(tmp_path / "evidence")

    return measured


@pytest.mark.timed
def test_latency_and_throughput_are_those_of_the_server(run: Measure, text: Path) -> None:
    evidence, rows = run(Script(service_ms=200), plan(text))
    metrics = evidence.metrics
    # The client's own way to a request and back comes on top; 5% is what the truth may be missed by.
    assert metrics["p50_latency_ms"] == pytest.approx(200, rel=0.05)
    assert metrics["p50_tpot_ms"] == pytest.approx(200 / TOKENS, rel=0.05)
    assert 200 / TOKENS <= metrics["p50_ttft_ms"] < 200 / TOKENS + 15
    assert len(rows) == RATE * SECONDS
    assert sum(row.output_tokens or 0 for row in rows) == RATE * SECONDS * TOKENS
    assert evidence.profiles[0].traffic.answered == evidence.profiles[0].traffic.sent == RATE * SECONDS
    assert evidence.profiles[0].traffic.aiperf_version == "0.13.0"
    assert judge(evidence, plan(text)).status == "pass"
    assert judge(evidence, plan(text, slo={"p95_latency_ms": 1})).status == "fail"


def test_every_error_is_counted(run: Measure, text: Path) -> None:
    evidence, _ = run(Script(error_every=5), plan(text))
    assert evidence.metrics["error_rate"] == 1 / 5
    assert evidence.profiles[0].traffic.errors == {"500 Internal Server Error": RATE * SECONDS // 5}
    verdict = judge(evidence, plan(text))
    assert (verdict.status, verdict.reason) == ("fail", "error_rate 20.00% > 0.00%")


@pytest.mark.timed
def test_a_stall_shows_in_full(run: Measure, text: Path) -> None:
    evidence, rows = run(Script(stall_at=2.0, stall_seconds=2.0), plan(text))
    # Who was due right after the stall began waited for nearly all of it; nobody waited longer.
    assert 1500 < evidence.metrics["p99_latency_ms"] < 2200
    assert sum((row.latency_ms or 0) > 300 for row in rows) >= RATE
    assert judge(evidence, plan(text)).status == "fail"


def test_a_server_that_dies_in_the_middle_fails_though_aiperf_calls_it_done(run: Measure, text: Path) -> None:
    evidence, rows = run(Script(die_after=20), plan(text))
    assert evidence.profiles[0].traffic.exit_status == 0
    assert sum(row.answered for row in rows) < 20
    verdict = judge(evidence, plan(text))
    assert (verdict.status, verdict.reason) == ("fail", "during the load test the server ended with status 9")


def test_too_little_text_for_unique_prompts_is_an_error(run: Measure, text: Path, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "just this much and no more than this, my friend"}))
    with pytest.raises(WorkerFailed, match="hand in more text"):
        run(Script(), plan(text, prompts=tmp_path / "short.jsonl"))


def in_the_clients_place(folder: Path, work: str) -> Path:
    """Write a worker in the client's environment that does the lines of ``work`` with its parts."""
    script = folder / "probe.py"
    script.write_text(
        f"import sys; sys.path.append({str(Path(__file__).parents[2])!r})\n"
        "import subprocess\nfrom pathlib import Path\nfrom slipway_worker import main\n"
        "from evals.load.traffic.client import Deck, _go_first\n"
        f"def work(request, report):\n{work}main(work)\n"
    )
    return script


def test_prompts_are_unique_and_as_long_as_asked_for(run_worker: Workers, text: Path, tmp_path: Path) -> None:
    probe = in_the_clients_place(
        tmp_path,
        "    deck = Deck(Path(request['prompts']), Path(request['tokenizer']), 1, 0)\n"
        "    first, second = deck.cut([48] * 250), deck.cut([32] * 100)\n"
        "    later = Deck(Path(request['prompts']), Path(request['tokenizer']), 1, deck.used)\n"
        "    return {'first': first, 'second': second, 'later': later.cut([48] * 150)}\n",
    )
    request = {"prompts": str(text / "prompts.jsonl"), "tokenizer": str(text)}
    cut: Any = run_worker("aiperf", probe, request, tmp_path)
    prompts = [*cut["first"], *cut["second"], *cut["later"]]
    assert len(set(prompts)) == 500
    assert {name: {len(prompt) for prompt in each} for name, each in cut.items()} == {
        "first": {48}, "second": {32}, "later": {48},
    }  # fmt: skip


def test_the_client_goes_first_and_nothing_else_does(run_worker: Workers, tmp_path: Path) -> None:
    """As root: what it starts inherits it, and its session is its own."""
    probe = in_the_clients_place(
        tmp_path,
        "    _go_first()\n"
        "    child = subprocess.check_output(['sh', '-c', 'nice; cat /proc/self/autogroup'], text=True).split()\n"
        "    return {'niceness': int(child[0]), 'autogroup': child[3:]}\n",
    )
    found = run_worker("aiperf", probe, {}, tmp_path)
    expected = -10 if os.geteuid() == 0 else 0
    assert found["niceness"] == expected
    assert found["autogroup"] in ([], [str(expected)])  # none: a kernel without autogroups
    assert os.getpriority(os.PRIO_PROCESS, 0) == 0


@pytest.mark.timed
def test_the_tail_is_the_queues_own(run: Measure, text: Path) -> None:
    """Four workers of 250 ms under 12 requests a second: the percentiles are those of that queue, within 5%."""
    service, workers = 250.0, 4
    queued = plan(text, request_rate=12, seconds=10, slo={})
    evidence, rows = run(Script(service_ms=service, workers=workers, tokens=2), queued)
    due = [row.due_ms for row in rows]
    truth = [end - at for at, end in zip(due, served(due, [service] * len(due), workers), strict=True)]
    for share in (50, 95, 99):
        assert evidence.metrics[f"p{share}_latency_ms"] == pytest.approx(percentile(truth, share), rel=0.05)
    waiting = evidence.profiles[0].queue
    assert waiting is not None
    assert not waiting.growing


@pytest.mark.timed
def test_the_capacity_is_what_the_workers_can_do(run: Measure, text: Path) -> None:
    """Five workers of 125 ms serve 40 a second. Saturation is called at 64, which they can't serve, and not at 32."""
    settings = {"step_seconds": 6, "max_steps": 4}
    searched = plan(text, request_rate=16, seconds=2, slo={"p95_latency_ms": 1500}, capacity=settings)
    evidence, _ = run(Script(service_ms=125, workers=5, tokens=2), searched)
    found = evidence.capacity
    assert found is not None
    status = {step.rate: step.status for step in found.steps}
    assert [status[rate] for rate in (16, 32, 64)] == ["holds", "holds", "saturated"]
    assert found.requests_per_second == pytest.approx(40, rel=0.1)
    assert found.served_when_saturated == pytest.approx(40, rel=0.1)
    assert evidence.metrics["capacity_requests_per_second"] == found.requests_per_second


def test_a_leak_of_a_megabyte_a_request_is_found_and_told(text: Path, tmp_path: Path, run_worker: Workers) -> None:
    leaky = plan(text, profiles=["soak"], request_rate=8, seconds=10, slo={"p95_latency_ms": 500})
    (tmp_path / "evidence").mkdir()
    with serving(Script(leak_kib=1024, service_ms=20)) as (url, process):
        status = Path(f"/proc/{process.pid}/statm")
        sampler = MemorySampler(lambda: {"memory_bytes": int(status.read_text().split()[1]) * 4096}, "proc")
        sampler.start()
        evidence = measure(
            Server(url, 1.0, 1 << 30, None, sampler, lambda: None), leaky, tokenizer=text,
            folder=tmp_path / "evidence", scratch=tmp_path, run_worker=run_worker, progress=print,
        )  # fmt: skip
    leak = evidence.profiles[0].leak
    assert leak is not None
    assert leak.bytes_per_request[0] == pytest.approx(2**20, rel=0.2)
    verdict = judge(evidence, leaky)
    assert (verdict.status, "memory leaks: at least" in verdict.reason) == ("fail", True)


def test_prompts_with_a_shared_beginning_share_it(run: Measure, text: Path, tmp_path: Path) -> None:
    shared = plan(text, profiles={"rag": {"request_rate": 8, "seconds": 4}}, slo={"error_rate": 0})
    evidence, _ = run(Script(context=512), shared)
    assert evidence.profiles[0].shortened
    rows = [json.loads(row) for row in (tmp_path / "scratch/1/aiperf/dataset.jsonl").read_text().splitlines()]
    beginnings = {row["text"][:40] for row in rows}
    assert 1 < len(beginnings) <= 12
    assert len({row["text"] for row in rows}) == len(rows)
    assert evidence.metrics["error_rate"] == 0


def test_live_figures_come_while_it_runs(text: Path, tmp_path: Path, run_worker: Workers) -> None:
    seen: list[TrafficProgress] = []
    (tmp_path / "evidence").mkdir()
    with serving(Script()) as (url, _):
        sampler = MemorySampler(lambda: {"memory_bytes": 1 << 20}, "test")
        sampler.start()
        measure(
            Server(url, 1.0, 1 << 30, None, sampler, lambda: None), plan(text), tokenizer=text,
            folder=tmp_path / "evidence", scratch=tmp_path, run_worker=run_worker, progress=print,
            live=seen.append,
        )  # fmt: skip
    under_way = [going for going in seen if going.phase == "load" and 0 < going.answered < RATE * SECONDS]
    assert under_way
    assert (under_way[-1].p95_latency_ms or 0) > 50
    assert {"warm-up", "load"} <= {sample.phase for sample in sampler.samples}
