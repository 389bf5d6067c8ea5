"""Suites: every file is one, their digests are of what is asked, and a model's file may change single keys."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from evals.drift import planning
from evals.drift.drift_gate import is_clear, judge
from evals.drift.limits import DriftLimits
from evals.drift.pairs import AnswerLengths, ChoicePairs, DocumentPair, Drift, Group, TextPairs
from evals.drift.suite import SUITES, load_suite, suite_names
from evals.errors import SuiteError


@pytest.mark.parametrize("name", suite_names())
def test_every_suite_can_be_named_and_planned(name: str) -> None:
    limits = DriftLimits.model_validate({"suite": name})
    tasks = planning.plan(limits)
    assert limits.name == name
    assert all(task.items > 0 and task.tokens > 0 for task in tasks)
    assert all(task.can_decide for task in tasks if task.tier == "critical" and name != "demo")


def test_the_suites_are_those_that_the_docs_name() -> None:
    assert suite_names() == ["code", "demo", "long-context", "standard", "support-chat", "vision"]
    asked = load_suite("standard").tasks
    assert list(asked) == [
        "mmlu", "hellaswag", "wikitext", "arc_challenge", "winogrande", "gsm8k", "truthfulqa", "ifeval",
    ]  # fmt: skip
    assert SUITES.is_dir()


def test_an_unknown_suite_gets_a_near_name() -> None:
    with pytest.raises(ValidationError, match=r"unknown suite `standart`: did you mean `standard`\?"):
        DriftLimits.model_validate({"suite": "standart"})


def test_a_suite_is_named_and_never_read_from_elsewhere() -> None:
    assert (SUITES / "../tasks/cloze.yaml").is_file()
    with pytest.raises(ValidationError, match=r"unknown suite `\.\./tasks/cloze`"):
        DriftLimits.model_validate({"suite": "../tasks/cloze"})


def test_a_model_changes_single_keys_and_adds_tasks() -> None:
    plain = DriftLimits.model_validate({"suite": "demo"})
    stricter = DriftLimits.model_validate(
        {"suite": "demo", "tasks": {"cloze": {"max_drop": 0.001, "tier": "supporting"}}}
    )
    assert stricter.tasks["cloze"].items == plain.tasks["cloze"].items
    assert stricter.tasks["cloze"].max_drop == 0.001
    assert stricter.digest == plain.digest  # a limit is no question
    fewer = DriftLimits.model_validate({"suite": "demo", "tasks": {"cloze": {"items": 100}}})
    assert fewer.digest != plain.digest
    more = DriftLimits.model_validate({"suite": "demo", "tasks": {"winogrande": {"max_drop": 0.01, "size": 1267}}})
    assert set(more.tasks) == {"cloze", "perplexity", "winogrande"}


def test_few_shot_seed_and_template_are_part_of_the_question() -> None:
    def digest(**task: object) -> str:
        tasks = {"arc_easy": {"max_drop": 0.01, **task}}
        return DriftLimits.model_validate({"suite": "demo", "tasks": tasks}).digest

    assert len({digest(), digest(fewshot=5), digest(chat_template=True), digest(metric="acc_norm")}) == 4
    seeds = {DriftLimits.model_validate({"suite": "demo", "seed": seed}).digest for seed in (1, 2)}
    assert len(seeds) == 2


def test_looks_are_for_files_of_data() -> None:
    with pytest.raises(ValidationError, match=r"asked in parts; `mmlu` has none"):
        DriftLimits.model_validate({"suite": "standard", "looks": 4})


def test_a_plan_needs_a_size_and_rows_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="needs `size`"):
        planning.plan(DriftLimits.model_validate({"suite": "demo", "tasks": {"arc_easy": {"max_drop": 0.01}}}))
    with pytest.raises(SuiteError, match="asks for 2001 items"):
        planning.plan(DriftLimits.model_validate({"suite": "demo", "tasks": {"cloze": {"items": 2001}}}))


TASKS = {"cloze": {"data": "c", "max_drop": 0.02}, "perplexity": {"data": "t", "max_increase": 0.01}}


def limits(looks: int = 1, **cloze: object) -> DriftLimits:
    tasks = {**TASKS, "cloze": {**TASKS["cloze"], **cloze}}
    return DriftLimits.model_validate({"tasks": tasks, "divergence": None, "looks": looks})


def drift(
    lost: int, gained: int, asked: DriftLimits, *, items: int = 1000, fraction: float = 1.0, **more: object
) -> Drift:
    documents = tuple(
        DocumentPair(id=str(number), bytes=100, baseline_nats=100.0, candidate_nats=100.1 + number % 3 / 100)
        for number in range(round(200 * fraction))
    )
    cloze = {
        "items": items, "baseline_missing": 0, "candidate_missing": 0, "baseline_right": round(items * 0.9),
        "candidate_right": round(items * 0.9) - lost + gained, "changed": lost + gained, "chance": 0.25,
        "lost_ids": tuple(map(str, range(lost))), "gained_ids": tuple(map(str, range(gained))),
        "lost_at": tuple(number * items // max(lost, 1) for number in range(lost)),
        "gained_at": tuple(number * items // max(gained, 1) for number in range(gained)), **more,
    }  # fmt: skip
    return Drift.model_validate(
        {
            "engine": {}, "engine_differences": (), "fraction": fraction,
            "suite": {"name": "own", "digest": asked.digest, "lm_eval": "0"},
            "tasks": {
                "cloze": ChoicePairs.model_validate(cloze),
                "perplexity": TextPairs(documents=documents, baseline_missing=0, candidate_missing=0),
            },
        }
    )  # fmt: skip


def test_another_suite_than_the_one_that_was_asked_is_no_pass() -> None:
    asked = limits()
    verdict = judge(drift(3, 2, asked), limits(items=500))
    assert (verdict.status, verdict.cause) == ("inconclusive", "suite-changed")
    assert judge(drift(3, 2, asked), asked).status == "pass"


@pytest.mark.parametrize(("tier", "status"), [("critical", "inconclusive"), ("supporting", "pass")])
def test_a_doubt_stops_the_release_for_a_critical_task_alone(tier: str, status: str) -> None:
    tasks = {**TASKS, "cloze": {**TASKS["cloze"], "tier": tier}}
    asked = DriftLimits.model_validate({"tasks": tasks, "divergence": None})
    assert judge(drift(40, 25, asked), asked).status == status


def test_an_advisory_task_is_told_and_decides_nothing() -> None:
    with pytest.raises(ValidationError, match="neither detects all damage alone"):
        limits(tier="advisory")
    tasks = {**TASKS, "told": {**TASKS["cloze"], "task": "cloze", "tier": "advisory", "max_drop": 0.0}}
    asked = DriftLimits.model_validate({"tasks": tasks, "divergence": None})
    found = drift(15, 5, asked)
    both = found.model_copy(update={"tasks": {**found.tasks, "told": found.tasks["cloze"]}})
    verdict = judge(both, asked)
    assert verdict.metrics["told.drop"] == 0.01
    assert "told" not in verdict.reason


def test_a_failure_of_a_supporting_task_stops_the_release() -> None:
    asked = limits(tier="supporting")
    assert judge(drift(80, 5, asked), asked).status == "fail"


def test_an_improvement_beyond_five_points_is_suspicious() -> None:
    asked = limits()
    verdict = judge(drift(5, 80, asked), asked)
    assert (verdict.status, verdict.cause) == ("inconclusive", "suspicious")
    assert "find another cause" in verdict.reason


@pytest.mark.parametrize(("tokens", "status"), [(950, "pass"), (1100, "pass"), (1101, "fail"), (899, "fail")])
def test_what_is_written_must_be_about_as_long_as_fp16_s(tokens: int, status: str) -> None:
    asked = limits()
    verdict = judge(drift(3, 2, asked, lengths=AnswerLengths(baseline=1000, candidate=tokens)), asked)
    assert verdict.status == status
    assert verdict.metrics["cloze.length_ratio"] == tokens / 1000


def test_groups_that_move_apart_widen_the_interval() -> None:
    asked = limits()
    even = {f"g{number}": Group(items=100, lost=2, gained=1) for number in range(10)}
    apart = {f"g{number}": Group(items=100, lost=20 if number == 0 else 0, gained=1) for number in range(10)}
    widths = [judge(drift(20, 10, asked, groups=groups), asked).metrics["cloze.drop_upper"] for groups in (even, apart)]
    assert widths[1] > widths[0] + 0.01


def test_an_early_look_that_is_clear_passes_and_one_that_is_not_says_so() -> None:
    asked = limits(looks=4)
    clear = drift(5, 5, asked, items=5000, fraction=0.5)
    assert judge(clear, asked).status == "pass"
    assert is_clear(clear, asked)
    unsure = drift(30, 15, asked, items=1000, fraction=0.5)
    verdict = judge(unsure, asked)
    assert (verdict.status, verdict.cause) == ("inconclusive", "stopped-early")
    assert not is_clear(unsure, asked)


def test_a_look_passes_only_within_what_it_may_spend() -> None:
    """At a quarter of the items the bound is 4.3 standard errors, not two."""
    once, looked = limits(), limits(looks=4)
    assert judge(drift(10, 10, once, items=1000), once).status == "pass"
    assert judge(drift(10, 10, looked, items=1000, fraction=0.25), looked).status == "inconclusive"


def test_the_reason_is_one_a_person_understands() -> None:
    asked = limits(max_drop=0.01)
    reason = judge(drift(13, 9, asked), asked).reason
    assert "accuracy on `cloze` fell 0.40 pp (13 lost and 9 gained of 1,000), at most" in reason
    assert "with 95% confidence; 1.00 pp is allowed: inconclusive;" in reason
    assert "more items would decide" in reason
