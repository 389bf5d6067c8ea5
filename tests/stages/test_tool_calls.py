"""Tool calls asked by the real worker, of a scripted server: the demo model can't call tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chat_server import chat_server

from evals.drift.answers import Answers, GeneratedAnswers
from evals.drift.asking import StartingServer, ask
from evals.drift.drift_gate import judge
from evals.drift.limits import DriftLimits
from evals.drift.pairs import ChoicePairs, Drift, compare
from evals.drift.suite import TASKS, TOOL_CALLS, AskedTasks, TaskLimits
from homes import DEMO
from pipeline.settings import Settings
from pipeline.workers.runner import Workers

ROWS = [json.loads(line) for line in (TASKS / "tool_calls.jsonl").read_text().splitlines()]
LIMITS = TaskLimits(task=TOOL_CALLS, data=TASKS / "tool_calls.jsonl", max_drop=0.05)


@contextmanager
def serving(silent_at: int) -> Iterator[str]:
    """A server that makes the right call, and answers the requests of the file from one on in text."""
    right = {row["prompt"]: row if number < silent_at else None for number, row in enumerate(ROWS)}

    def choose(body: dict[str, Any]) -> dict[str, Any]:
        row = right[body["messages"][0]["content"]]
        message: dict[str, Any] = {"content": "I can't do that."}
        if row is not None:
            function = {"name": row["name"], "arguments": json.dumps(row["arguments"])}
            message = {"content": None, "tool_calls": [{"type": "function", "function": function}]}
        return {"message": message}

    with chat_server(choose, tokens=24) as url:
        yield url


def asked(machine: Settings, folder: Path, silent_at: int) -> Answers:
    suite = AskedTasks(tasks={TOOL_CALLS: LIMITS})
    address, output, scratch = folder / "address", folder / "answers", folder / "scratch"
    for made in (output, scratch):
        made.mkdir(parents=True)
    with serving(silent_at) as url:
        address.write_text(url)
        server = StartingServer(
            address=str(address), name="scripted", image="fp16", engine={"name": "scripted"}, chat_template=None
        )
        more: dict[str, Any] = {"run_worker": Workers(machine, print), "scratch": scratch, "progress": print}
        return ask(DEMO / "model", suite, output, serving=server, again=8, **more)


@pytest.fixture(scope="module")
def paired(machine: Settings, tmp_path_factory: pytest.TempPathFactory) -> Drift:
    """FP16 makes every call; the candidate leaves out the last twelve."""
    folder = tmp_path_factory.mktemp("calls")
    return compare(asked(machine, folder / "fp16", 48), asked(machine, folder / "candidate", 36))


def test_valid_calls_are_paired_like_any_other_task(paired: Drift) -> None:
    pairs = paired.tasks[TOOL_CALLS]
    assert isinstance(pairs, ChoicePairs)
    assert (pairs.items, pairs.baseline_right, pairs.candidate_right) == (48, 48, 36)
    assert {name.split("-")[0] for name in pairs.lost_ids} == {"get_stock_price", "multiply"}
    assert pairs.again is not None
    assert (pairs.again.items, pairs.again.changed) == (8, 0)
    assert any("get_stock_price" in example.baseline and "(0 calls)" in example.candidate for example in pairs.examples)


def test_a_candidate_that_calls_worse_than_fp16_is_refused(paired: Drift) -> None:
    limits = DriftLimits.model_construct(tasks={TOOL_CALLS: LIMITS}, divergence=None)
    verdict = judge(paired, limits)
    assert verdict.status == "fail"
    assert "`tool_calls`" in verdict.reason


def test_the_longest_request_is_noted(machine: Settings, tmp_path: Path) -> None:
    """300 tokens of prompt, and room for 256 of answer."""
    found = asked(machine, tmp_path, 48)
    assert found.longest == 556
    task = found.tasks[TOOL_CALLS]
    assert isinstance(task, GeneratedAnswers)
    assert {item.tokens for item in task.items} == {24}
