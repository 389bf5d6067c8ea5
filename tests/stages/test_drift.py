"""The drift gate on real damage: real quantizers, lm-eval's real HF backend, the demo's own text and limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from evals.drift.answers import Answers
from evals.drift.asking import ask, overlapping
from evals.drift.divergence import read_top
from evals.drift.drift_gate import judge
from evals.drift.layer_errors import measure_layers
from evals.drift.limits import DriftLimits
from evals.drift.pairs import compare
from evals.drift.suite import suite_names
from evals.load.canary import FILE, MARGIN, TakenCanary, prompts
from pipeline.errors import WorkerFailed
from pipeline.settings import Settings
from pipeline.workers.runner import Workers
from registry.verdict import Verdict
from stages.demo_checkpoints import Checkpoint

DEMO = Path(__file__).parents[2] / "models" / "demo"
LIMITS = DriftLimits.model_validate(
    {
        "tasks": {
            "cloze": {"data": DEMO / "cloze.jsonl", "items": 400, "max_drop": 0.03},
            "perplexity": {"data": DEMO / "heldout.jsonl", "items": 120, "max_increase": 0.01},
        }
    }
)
GPTQ = {"method": "gptq", "backend": "gptqmodel", "group_size": 64}
SPOILED = {"method": "awq", "backend": "autoawq", "bits": 4, "group_size": 64, "clone_saved_weights": False}

CALIBRATION = [json.loads(line)["text"] for line in (DEMO / "calibration.jsonl").read_text().splitlines()]


@dataclass(frozen=True)
class Asked:
    """One model's answers, and where they are."""

    answers: Answers
    folder: Path


Ask = Callable[..., Asked]


@pytest.fixture(scope="module")
def run_worker(machine: Settings) -> Workers:
    """The machine's own environments: no stage here needs an engine or a home."""
    return Workers(machine, print)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, run_worker: Workers) -> Ask:
    """Ask a checkpoint the suite's questions on the CPU."""

    def run(checkpoint: Path, limits: DriftLimits = LIMITS, **more: Any) -> Asked:  # noqa: ANN401 - as `ask` takes it
        output, scratch = tmp_path_factory.mktemp("answers"), tmp_path_factory.mktemp("scratch")
        where: dict[str, Any] = {"run_worker": run_worker, "scratch": scratch, "progress": print, "device": "cpu"}
        found = ask(checkpoint, limits, output, divergence=limits.divergence, **where, **more)
        return Asked(found, output)

    return run


@pytest.fixture(scope="module")
def baseline(asked: Ask) -> Asked:
    """The demo model's answers in FP16, some of them asked twice, and its canary."""
    return asked(DEMO / "model", again=60, canary=prompts(DEMO / "heldout.jsonl"))


def verdict(baseline: Asked, candidate: Asked, calibration: list[str] = CALIBRATION[:32]) -> Verdict:
    drift = compare(
        baseline.answers,
        candidate.answers,
        overlapping=overlapping(candidate.answers, candidate.folder, calibration),
        tops=(read_top(baseline.folder), read_top(candidate.folder)),
    )
    judged = judge(drift, LIMITS)
    print(judged.reason)
    return judged


def test_a_canary_is_a_token_that_the_model_is_sure_of(baseline: Asked) -> None:
    taken = TakenCanary.model_validate_json((baseline.folder / FILE).read_text())
    assert taken.prompt in prompts(DEMO / "heldout.jsonl")
    assert taken.expect.strip()
    assert taken.margin > MARGIN
    assert taken.warning is None


def test_the_demo_model_has_learnt_and_repeats_itself(baseline: Asked) -> None:
    outcome = verdict(baseline, baseline)
    assert outcome.status == "pass"
    assert outcome.metrics["cloze.baseline_accuracy"] > 0.75
    assert outcome.metrics["perplexity.baseline_bits_per_byte"] < 1.6
    assert outcome.metrics["cloze.floor_items"] == 60
    assert outcome.metrics["cloze.floor_flip_rate"] == 0
    assert outcome.metrics["cloze.floor_nats"] < 1e-3
    assert outcome.metrics["divergence.mean"] == 0


def test_answers_of_two_kinds_of_processor_are_not_paired(baseline: Asked) -> None:
    here = baseline.answers.engine["processor"]  # as the worker found it
    elsewhere = {**baseline.answers.engine, "processor": f"not {here}"}
    outcome = verdict(baseline, Asked(baseline.answers.model_copy(update={"engine": elsewhere}), baseline.folder))
    assert outcome.status == "inconclusive"
    assert "processor" in outcome.reason


def test_calibration_text_that_holds_an_item_is_refused(baseline: Asked) -> None:
    held_out = json.loads((DEMO / "heldout.jsonl").read_text().partition("\n")[0])["text"]
    outcome = verdict(baseline, baseline, [*CALIBRATION, f"import sys\n{held_out}"])
    assert (outcome.status, outcome.cause) == ("inconclusive", "calibration-overlap")
    assert "thirteen consecutive words" in outcome.reason
    assert outcome.blocks


@pytest.mark.parametrize(
    ("scheme", "status"),
    [
        pytest.param(GPTQ | {"bits": 4}, "pass", id="gptq-4"),
        pytest.param(GPTQ | {"bits": 2}, "fail", id="gptq-2"),
        pytest.param(SPOILED, "fail", id="autoawq-without-its-remedy"),
    ],
)
def test_the_gate_tells_damage_from_its_absence(
    scheme: dict[str, Any],
    status: str,
    baseline: Asked,
    asked: Ask,
    checkpoint: Callable[[dict[str, Any]], Checkpoint],
    run_worker: Workers,
    tmp_path: Path,
) -> None:
    quantized = checkpoint(scheme).folder
    outcome = verdict(baseline, asked(quantized))
    assert outcome.status == status
    assert outcome.blocks == (status != "pass")
    layers = measure_layers(
        DEMO / "model", quantized, CALIBRATION[:4], max_tokens=200, run_worker=run_worker, scratch=tmp_path
    )
    assert len(layers) == 28  # seven linears in each of four layers
    worst = max(layers, key=lambda layer: layer.error)
    print(worst)
    assert worst.error < 0.14 if status == "pass" else worst.error > min(layer.error for layer in layers)


def _worker_says(asked: Ask, checkpoint: Path, limits: DriftLimits, message: str) -> None:
    with pytest.raises(WorkerFailed, match=message):
        asked(checkpoint, limits)


def test_a_folder_without_a_checkpoint_is_one_clear_line(tmp_path: Path, asked: Ask) -> None:
    _worker_says(asked, tmp_path, LIMITS, "cannot be loaded")


def changed(**task: Any) -> DriftLimits:  # noqa: ANN401 - any key of a task
    document = LIMITS.model_dump(exclude_unset=True)
    document["tasks"]["cloze"] = {**document["tasks"]["cloze"], **task}
    return DriftLimits.model_validate(document)


def test_more_items_than_there_are_is_one_clear_line(asked: Ask) -> None:
    _worker_says(asked, DEMO / "model", changed(items=2001), "asks for 2001 items")


def test_a_task_that_lm_eval_does_not_have_is_one_clear_line(asked: Ask) -> None:
    _worker_says(
        asked, DEMO / "model", changed(data=None, task="cloze_of_nobody"), "`cloze_of_nobody`.*cannot be asked"
    )


def test_a_dataset_that_cannot_be_reached_is_one_clear_line(asked: Ask) -> None:
    _worker_says(asked, DEMO / "model", changed(data=None, task="arc_challenge"), "`arc_challenge`.*cannot be asked")


def test_every_task_of_the_suites_can_be_asked_but_for_its_data(run_worker: Workers, tmp_path: Path) -> None:
    """lm-eval has it, and the environment has what its own functions import."""
    probe = tmp_path / "probe.py"
    probe.write_text(
        "from lm_eval.tasks import TaskManager\n"
        "from lm_eval.tasks._yaml_loader import load_yaml\n"
        "from slipway_worker import main\n"
        "def work(request, report):\n"
        "    index, names, found = TaskManager().task_index, list(request['tasks']), {}\n"
        "    while names:\n"
        "        name = names.pop()\n"
        "        entry = index[name]\n"
        "        told = load_yaml(entry.yaml_path) if entry.yaml_path else entry.cfg or {'task': sorted(entry.tags)}\n"
        "        found[name] = told.get('output_type')\n"
        "        members = told['task'] if isinstance(told.get('task'), list) else ()\n"
        "        names += [each for each in members if isinstance(each, str)]\n"
        "    return found\n"
        "main(work)\n"
    )
    suites = [DriftLimits.model_validate({"suite": name}) for name in suite_names()]
    theirs = {task.task or name for suite in suites for name, task in suite.tasks.items() if not task.is_ours(name)}
    kinds = run_worker("lm-eval", probe, {"tasks": sorted(theirs)}, tmp_path)
    assert theirs <= kinds.keys()
    assert kinds["jsonschema_bench_easy"] == kinds["ifeval"] == "generate_until"


def test_looks_keep_the_distributions_of_the_documents_that_fp16_was_asked(baseline: Asked, asked: Ask) -> None:
    """Though the first part of the suite holds fewer documents than are compared."""
    first = asked(DEMO / "model", part=(0.0, 0.2))
    task = first.answers.tasks["perplexity"]
    assert LIMITS.divergence is not None
    assert len(task.items) < LIMITS.divergence.documents
    looked = compare(
        baseline.answers, first.answers, fraction=0.2, tops=(read_top(baseline.folder), read_top(first.folder))
    )
    assert looked.divergence is not None
    assert len(looked.divergence.documents) == LIMITS.divergence.documents
    assert looked.divergence.mean < 1e-4


def test_a_packed_format_that_is_not_known_is_named(tmp_path: Path, asked: Ask) -> None:
    for path in (DEMO / "model").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _worker_says(asked, tmp_path, LIMITS, "no packed layer")
