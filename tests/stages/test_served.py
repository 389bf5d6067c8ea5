"""Evaluation as served: FP16 in the real runtime answers as lm-eval's own backend does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from evals.drift.answers import Answers, ChoiceAnswer, TextAnswer, read_answers
from evals.drift.asking import ask
from evals.drift.divergence import agreement, kl, read_top
from homes import DEMO, make_home
from pipeline.settings import Settings
from pipeline.spec import ModelSpec, load
from pipeline.stages.context import StageContext
from pipeline.stages.run import run_until
from pipeline.workers.runner import Workers
from registry.counting import is_count


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    """The demo, asked a little of its suite."""
    demo = load(DEMO.with_suffix(".yaml"))
    tasks = {name: task.model_copy(update={"items": 60}) for name, task in demo.evals.tasks.items()}
    return demo.model_copy(update={"evals": demo.evals.model_copy(update={"tasks": tasks, "again": 20})})


@pytest.fixture(scope="module")
def context(spec: ModelSpec, machine: Settings, tmp_path_factory: pytest.TempPathFactory) -> StageContext:
    home = make_home(tmp_path_factory.mktemp("served") / "home", machine)
    return StageContext(spec, "gptq", Settings.read(home), print)


@pytest.fixture(scope="module")
def served(context: StageContext) -> Path:
    """FP16's answers as served."""
    return run_until("baseline", context)["baseline"].folder


@pytest.fixture(scope="module")
def local(spec: ModelSpec, machine: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by lm-eval's HF backend, in float32."""
    output, scratch = tmp_path_factory.mktemp("answers"), tmp_path_factory.mktemp("scratch")
    run: dict[str, Any] = {"run_worker": Workers(machine, print), "scratch": scratch, "progress": print}
    ask(DEMO / "model", spec.evals, output, device="cpu", divergence=spec.evals.divergence, **run)
    (output.parent / "told.log").write_text((scratch / "output.log").read_text())
    return output


def scores(answers: Answers, task: str) -> dict[str, list[float]]:
    found = {}
    for item in answers.tasks[task].items:
        if isinstance(item, ChoiceAnswer):
            found[item.id] = [score for score in item.log_likelihoods if score is not None]
        elif isinstance(item, TextAnswer) and item.log_likelihood is not None:
            found[item.id] = [item.log_likelihood]
    return found


def test_the_server_answers_as_lm_eval_s_own_backend_does(served: Path, local: Path) -> None:
    """Bfloat16 beside float32: a few hundredths of a nat a choice, no bias, and the same items."""
    here, there = scores(read_answers(served), "cloze"), scores(read_answers(local), "cloze")
    assert here.keys() == there.keys()
    differences = [one - other for item in here for one, other in zip(here[item], there[item], strict=True)]
    assert len(differences) == 240
    assert max(map(abs, differences)) < 0.6
    assert abs(sum(differences) / len(differences)) < 0.02
    text, same = scores(read_answers(served), "perplexity"), scores(read_answers(local), "perplexity")
    assert sum(map(sum, text.values())) == pytest.approx(sum(map(sum, same.values())), rel=1e-3)


def test_a_worker_tells_how_many_are_answered(local: Path) -> None:
    """Plain lines, as Dagster's log has them too; the numbers are those of the questions. Two seconds need none."""
    log = (local.parent / "told.log").read_text()
    seconds = re.search(r"^cloze: answered in ([\d.]+) s$", log, re.MULTILINE)
    assert seconds is not None
    told = [line for line in log.splitlines() if is_count(line)]
    assert float(seconds[1]) < 4 or [line for line in told if re.search(r": 240 of 240 prompts after \d+ s", line)]


def test_the_server_tells_the_distributions_too(served: Path, local: Path) -> None:
    here, there = read_top(served), read_top(local)
    assert here is not None
    assert there is not None
    assert kl(there, here).mean() < 0.005
    assert agreement(there, here).mean() > 0.97


def test_the_evidence_says_what_was_asked_and_how(served: Path, spec: ModelSpec) -> None:
    answers = read_answers(served)
    assert answers.engine["name"] == "vllm-served"
    assert answers.engine["dtype"] == "bfloat16"
    assert answers.suite.digest == spec.evals.digest
    again = answers.tasks["cloze"].again  # type: ignore[union-attr]
    assert again is not None
    assert (again.items, again.flips) == (20, 0)
