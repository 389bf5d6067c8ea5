"""The drift gate's law: bounds decide, nothing is rounded, and what is missing never passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from containers.sandbox.kernels import ComputedOn, Kernels
from evals.drift.answers import Answers, ChoiceAnswer, read_answers
from evals.drift.drift_gate import judge
from evals.drift.limits import DriftLimits
from evals.drift.pairs import ChoicePairs, Drift, TextPairs, compare, read_drift, write_drift
from evals.drift.suite import questions
from evals.errors import AnswersError, SuiteError
from registry.verdict import Verdict

RIGHT, WRONG = [-1.0, -2.0, -3.0, -4.0], [-2.0, -1.0, -3.0, -4.0]
Items = list[dict[str, Any]]


def choices(right: list[bool]) -> Items:
    return [
        {"id": f"c{number}", "answer": 0, "log_likelihoods": RIGHT if hit else WRONG}
        for number, hit in enumerate(right)
    ]


def texts(nats: list[float]) -> Items:
    return [{"id": f"t{number}", "bytes": 500, "log_likelihood": -value} for number, value in enumerate(nats)]


def answers(cloze: Items | None, perplexity: Items | None, engine: dict[str, Any] | None = None) -> Answers:
    tasks: dict[str, Any] = {}
    if cloze is not None:
        tasks["cloze"] = {"kind": "choice", "data_sha256": "c", "items": cloze}
    if perplexity is not None:
        tasks["perplexity"] = {"kind": "text", "data_sha256": "t", "items": perplexity}
    document = {
        "schema": "slipway.answers/2", "engine": engine or {"name": "hf"}, "tasks": tasks,
        "suite": {"name": "own", "digest": limits().digest, "lm_eval": "0.4.13"},
    }  # fmt: skip
    return Answers.model_validate_json(json.dumps(document))


def limits(**changed: object) -> DriftLimits:
    tasks = {"cloze": {"data": "c", "max_drop": 0.02}, "perplexity": {"data": "t", "max_increase": 0.01}}
    return DriftLimits.model_validate({"tasks": tasks, "divergence": None, **changed})


def documents(factor: float, noise: float = 0.0) -> Items:
    rng = np.random.default_rng(5)
    base = rng.gamma(20.0, 20.0, size=100)
    return texts([float(value) for value in base * factor + rng.normal(0, 1, size=100) * noise])


BASELINE_HITS = [number % 10 != 0 for number in range(1000)]


def flipped(lost: int, gained: int) -> list[bool]:
    hits = list(BASELINE_HITS)
    for number in [n for n, hit in enumerate(hits) if hit][:lost]:
        hits[number] = False
    for number in [n for n, hit in enumerate(BASELINE_HITS) if not hit][:gained]:
        hits[number] = True
    return hits


def verdict(cloze: Items | None, perplexity: Items | None, **changed: object) -> Verdict:
    baseline = answers(choices(BASELINE_HITS), documents(1.0))
    return judge(compare(baseline, answers(cloze, perplexity)), limits(**changed))


def test_a_small_loss_within_both_limits_passes() -> None:
    outcome = verdict(choices(flipped(8, 7)), documents(1.002, 0.5))
    assert outcome.status == "pass"
    assert not outcome.blocks
    assert outcome.cause is None
    assert "accuracy on `cloze`" in outcome.reason
    assert "bits per byte on `perplexity`" in outcome.reason


def test_the_same_answers_pass() -> None:
    assert verdict(choices(BASELINE_HITS), documents(1.0)).status == "pass"


def test_a_verdict_says_which_quantization_its_engine_left_out() -> None:
    both = answers(choices(BASELINE_HITS), documents(1.0))
    found = judge(compare(both, both, not_computed=("inputs in FP8", "keys and values in FP8")), limits())
    assert found.status == "pass"
    assert found.reason.endswith("; the loss of the weights alone, without inputs in FP8 and keys and values in FP8")


def test_likelihood_alone_refuses_what_accuracy_lets_through() -> None:
    outcome = verdict(choices(flipped(8, 7)), documents(1.036, 2.0))
    assert outcome.status == "fail"
    assert "perplexity" in outcome.reason
    assert "cloze" not in outcome.reason
    assert outcome.metrics["cloze.drop_upper"] <= 0.02


def test_accuracy_alone_refuses_what_likelihood_lets_through() -> None:
    outcome = verdict(choices(flipped(60, 5)), documents(1.0))
    assert outcome.status == "fail"
    assert "at least" in outcome.reason
    assert outcome.metrics["cloze.mcnemar_p"] < 1e-6
    assert (outcome.metrics["cloze.lost"], outcome.metrics["cloze.gained"]) == (60, 5)


def test_between_the_bounds_is_inconclusive_and_says_what_would_tell() -> None:
    outcome = verdict(choices(flipped(40, 25)), documents(1.0))
    assert (outcome.status, outcome.cause) == ("inconclusive", "too-few-items")
    assert outcome.blocks
    assert "more items would decide" in outcome.reason


def test_a_doubt_may_be_let_through_in_writing_and_only_that_doubt() -> None:
    cloze = choices(flipped(40, 25))
    allowed = verdict(cloze, documents(1.0), accept_inconclusive={"too-few-items": "a demo"})
    assert allowed.accepted_because == "a demo"
    assert not allowed.blocks
    assert verdict(cloze, documents(1.0), accept_inconclusive={"engine-differs": "a demo"}).blocks


def test_two_doubts_are_not_let_through_by_accepting_one() -> None:
    outcome = verdict(choices(flipped(40, 25)), None, accept_inconclusive={"too-few-items": "a demo"})
    assert outcome.blocks


def test_a_failure_is_never_let_through() -> None:
    accepted = {"too-few-items": "x", "not-answered": "x"}
    assert verdict(choices(flipped(60, 5)), documents(1.0), accept_inconclusive=accepted).blocks


def test_the_limit_is_compared_unrounded() -> None:
    cloze, perplexity = choices(flipped(8, 7)), documents(1.002, 0.5)
    upper = verdict(cloze, perplexity).metrics["cloze.drop_upper"]

    def at(limit: float) -> str:
        tasks = {"cloze": {"data": "c", "max_drop": limit}, "perplexity": {"data": "t", "max_increase": 0.01}}
        return verdict(cloze, perplexity, tasks=tasks).status

    assert at(upper) == "pass"
    assert at(upper - 1e-9) == "inconclusive"


def test_every_figure_that_was_compared_is_in_the_verdict() -> None:
    outcome = verdict(choices(flipped(8, 7)), documents(1.002, 0.5))
    assert outcome.limits == {"confidence": 0.95, "cloze.max_drop": 0.02, "perplexity.max_increase": 0.01}
    assert outcome.metrics["cloze.drop"] == pytest.approx(0.001)
    assert outcome.metrics["cloze.baseline_accuracy"] == 0.9
    before, after = (outcome.metrics[f"perplexity.{who}_bits_per_byte"] for who in ("baseline", "candidate"))
    assert outcome.metrics["perplexity.increase"] == pytest.approx(after / before - 1)


@pytest.mark.parametrize("spoil", ["drop", "null"])
@pytest.mark.parametrize("task", ["cloze", "perplexity"])
def test_a_candidate_that_leaves_items_out_fails(task: str, spoil: str) -> None:
    items = {"cloze": choices(BASELINE_HITS), "perplexity": documents(1.0)}
    if spoil == "drop":
        del items[task][3]
    elif task == "cloze":
        items[task][3]["log_likelihoods"] = [-1.0, None, -2.0, -3.0]
    else:
        items[task][3]["log_likelihood"] = None
    outcome = verdict(items["cloze"], items["perplexity"])
    assert outcome.status == "fail"
    assert f"1 items of `{task}`" in outcome.reason


@pytest.mark.parametrize("task", ["cloze", "perplexity"])
def test_a_baseline_that_leaves_items_out_decides_nothing(task: str) -> None:
    items = {"cloze": choices(BASELINE_HITS), "perplexity": documents(1.0)}
    del items[task][3]
    drift = compare(answers(items["cloze"], items["perplexity"]), answers(choices(BASELINE_HITS), documents(1.0)))
    assert (judge(drift, limits()).status, judge(drift, limits()).cause) == ("inconclusive", "baseline-incomplete")


@pytest.mark.parametrize(
    ("cloze", "perplexity"), [(None, documents(1.0)), (choices(BASELINE_HITS), None), (None, None)]
)
def test_a_task_neither_answered_never_passes(cloze: Items | None, perplexity: Items | None) -> None:
    outcome = judge(compare(answers(cloze, perplexity), answers(cloze, perplexity)), limits())
    assert (outcome.status, outcome.cause) == ("inconclusive", "not-answered")


def test_no_items_at_all_never_pass() -> None:
    outcome = judge(compare(answers([], []), answers([], [])), limits())
    assert outcome.status == "inconclusive"


def test_different_engines_are_no_pair() -> None:
    items = choices(BASELINE_HITS), documents(1.0)
    drift = compare(answers(*items, {"name": "hf", "torch": "1"}), answers(*items, {"name": "hf", "torch": "2"}))
    outcome = judge(drift, limits())
    assert (outcome.status, outcome.cause) == ("inconclusive", "engine-differs")
    assert "torch" in outcome.reason


def test_kernels_of_two_instruction_sets_are_no_pair() -> None:
    told = {
        "attention": "CPU_ATTN", "compute_dtype": "bfloat16", "cpu_model": "A CPU", "kv_cache_dtype": "bfloat16",
        "linear_16bit": "float32", "linear_quantized": {}, "threads": 2,
    }  # fmt: skip
    slow, fast = (
        ComputedOn(kernels=Kernels.model_validate({**told, "instruction_set": each})) for each in ("avx2", "avx512")
    )
    both = answers(choices(BASELINE_HITS), documents(1.0))
    drift = compare(both, both, computed_on={"FP16": fast, "candidate": slow})
    outcome = judge(Drift.model_validate_json(drift.model_dump_json(by_alias=True)), limits())
    assert (outcome.status, outcome.cause) == ("inconclusive", "engine-differs")
    assert "kernels.instruction_set" in outcome.reason
    assert compare(both, both, computed_on={"FP16": slow, "candidate": slow}).engine_differences == ()


def test_a_baseline_at_chance_can_show_no_loss() -> None:
    hits = [number % 4 == 0 for number in range(1000)]
    both = answers(choices(hits), documents(1.0))
    outcome = judge(compare(both, both), limits())
    assert (outcome.status, outcome.cause) == ("inconclusive", "baseline-at-chance")


def test_few_documents_are_inconclusive() -> None:
    few = answers(choices(BASELINE_HITS), documents(1.0)[:29])
    assert judge(compare(few, few), limits()).cause == "too-few-items"


def test_a_task_of_the_wrong_kind_does_not_pass() -> None:
    both = answers(choices(BASELINE_HITS), documents(1.0))
    tasks = {"cloze": {"data": "c", "max_increase": 0.01}, "perplexity": {"data": "t", "max_drop": 0.02}}
    assert judge(compare(both, both), limits(tasks=tasks)).cause == "not-answered"


def test_flips_are_counted_both_ways_with_their_items() -> None:
    one = answers(choices([True, True, False, False]), None)
    pairs = compare(one, answers(choices([True, False, True, False]), None)).tasks["cloze"]
    assert isinstance(pairs, ChoicePairs)
    assert (pairs.lost_ids, pairs.gained_ids, pairs.changed) == (("c1",), ("c2",), 2)
    assert (pairs.baseline_right, pairs.candidate_right, pairs.chance) == (2, 2, 0.25)


def test_pairs_are_by_id_and_not_by_place() -> None:
    items = documents(1.0)
    pairs = compare(answers(None, items), answers(None, items[::-1])).tasks["perplexity"]
    assert isinstance(pairs, TextPairs)
    assert all(document.baseline_nats == document.candidate_nats for document in pairs.documents)


def test_the_first_of_equal_choices_is_chosen() -> None:
    tie = answers([{"id": "a", "answer": 1, "log_likelihoods": [-1.0, -1.0]}], None).tasks["cloze"].items[0]
    assert isinstance(tie, ChoiceAnswer)
    assert tie.chosen == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda items: items[0].update(answer=1), "different questions"),
        (lambda items: items.append(items[0]), "twice"),
    ],
)
def test_answers_that_do_not_belong_together_are_refused(change: Callable[[Items], None], message: str) -> None:
    other = choices(BASELINE_HITS)
    change(other)
    with pytest.raises(AnswersError, match=message):
        compare(answers(choices(BASELINE_HITS), None), answers(other, None))


def test_other_data_under_the_same_name_is_refused() -> None:
    one = answers(choices(BASELINE_HITS), None)
    document = json.loads(one.model_dump_json(by_alias=True))
    document["tasks"]["cloze"]["data_sha256"] = "other"
    with pytest.raises(AnswersError, match="over different data"):
        compare(one, Answers.model_validate(document))


def test_evidence_comes_back_as_it_was_written(tmp_path: Path) -> None:
    baseline = answers(choices(BASELINE_HITS), documents(1.0))
    drift = compare(baseline, answers(choices(flipped(3, 2)), documents(1.01, 1.0)))
    write_drift(drift, tmp_path)
    assert read_drift(tmp_path) == drift


@pytest.mark.parametrize("content", ["", "{}", '{"schema": "slipway.drift/9"}', "[1"])
def test_broken_evidence_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "drift.json").write_text(content)
    (tmp_path / "answers.json").write_text(content)
    with pytest.raises(AnswersError, match="again"):
        read_drift(tmp_path)
    with pytest.raises(AnswersError, match="again"):
        read_answers(tmp_path)


def test_absent_evidence_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnswersError, match="No such file"):
        read_drift(tmp_path)


def test_evidence_holds_no_nan() -> None:
    document = {"id": "a", "bytes": 1, "baseline_nats": float("nan"), "candidate_nats": 1.0}
    task = {"kind": "text", "documents": [document], "baseline_missing": 0, "candidate_missing": 0}
    with pytest.raises(ValidationError):
        Drift.model_validate({"engine": {}, "engine_differences": (), "tasks": {"perplexity": task}})


@pytest.mark.parametrize(
    "tasks",
    [
        {},
        {"cloze": {"data": "c", "max_drop": 0.02}},
        {"perplexity": {"data": "c", "max_increase": 0.02}},
        {"cloze": {"data": "c"}, "perplexity": {"data": "c", "max_increase": 0.02}},
        {"cloze": {"data": "c", "max_drop": 0.02, "max_increase": 0.1}},
        {"cloze": {"data": "c", "max_dorp": 0.02}, "perplexity": {"data": "c", "max_increase": 0.02}},
    ],
)
def test_limits_that_leave_a_hole_are_refused(tasks: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DriftLimits.model_validate({"tasks": tasks})


def test_questions_do_not_depend_on_limits_but_on_the_data(tmp_path: Path) -> None:
    data = {name: tmp_path / f"{name}.jsonl" for name in ("cloze", "perplexity")}

    def asked(items: int, drop: float, cloze: str = "one\n") -> dict[str, Any]:
        data["cloze"].write_text(cloze)
        data["perplexity"].write_text("text\n")
        tasks = {
            "cloze": {"data": data["cloze"], "items": items, "max_drop": drop},
            "perplexity": {"data": data["perplexity"], "max_increase": 0.01},
        }
        return questions(limits(tasks=tasks))

    assert asked(5, 0.1) == asked(5, 0.2)
    assert asked(5, 0.1) != asked(6, 0.1)
    assert asked(5, 0.1) != asked(5, 0.1, cloze="two\n")


def test_an_unknown_task_and_absent_data_are_named(tmp_path: Path) -> None:
    text = {"data": tmp_path / "none.jsonl", "max_increase": 0.1}
    with pytest.raises(ValidationError, match=r"unknown task `clozze` over a file of data: did you mean `cloze`"):
        limits(tasks={"clozze": {"data": tmp_path, "max_drop": 0.1}, "perplexity": text})
    with pytest.raises(SuiteError, match="cannot be read"):
        questions(limits(tasks={"cloze": {"data": tmp_path / "none.jsonl", "max_drop": 0.1}, "perplexity": text}))


def with_adapter(factor: float) -> Drift:
    """FP16 and the candidate, which answer alike; with an adapter the candidate's likelihood is ``factor`` as good."""
    baseline = answers(choices(BASELINE_HITS), documents(1.0))
    adapter = compare(baseline, answers(choices(BASELINE_HITS), documents(factor)))
    return compare(baseline, baseline, adapters={"support": adapter})


def test_an_adapter_is_judged_like_the_model_by_its_own_limits_or_the_models(tmp_path: Path) -> None:
    write_drift(with_adapter(1.05), tmp_path)
    drift = read_drift(tmp_path)
    refused = judge(drift, limits(), ["support"])
    assert refused.status == "fail"
    assert "adapter `support`: " in refused.reason
    assert refused.limits["adapter.support.perplexity.max_increase"] == 0.01
    own = {"tasks": {"perplexity": {"data": "t", "max_increase": 0.1}}}
    asked = limits(adapters={"support": own}).of_adapter("support")
    suite = drift.adapters["support"].suite
    assert suite is not None
    pairs = {"perplexity": drift.adapters["support"].tasks["perplexity"]}
    changed = drift.adapters["support"].model_copy(
        update={"tasks": pairs, "suite": suite.model_copy(update={"digest": asked.digest})}
    )
    drift = drift.model_copy(update={"adapters": {"support": changed}})
    assert judge(drift, limits(adapters={"support": own}), ["support"]).status == "pass"


def test_an_adapter_that_was_not_asked_never_passes() -> None:
    drift = with_adapter(1.0)
    assert judge(drift, limits(), ["support"]).status == "pass"
    missing = judge(drift, limits(), ["support", "legal"])
    assert (missing.status, missing.cause) == ("inconclusive", "not-answered")
    assert "the adapter `legal` was not evaluated" in missing.reason
