"""lm-eval's samples as answers: every kind that is read, lm-eval's own scores, and what can't be paired refused."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter

from evals.drift import overlap
from evals.drift.answers import ChoiceAnswer, GeneratedAnswer, TextAnswer
from pipeline.workers import slipway_worker

MODEL = SimpleNamespace(tok_encode=str.split)
TASK: dict[str, Any] = {"metric": None, "filter": None}


@pytest.fixture
def items(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as the worker has it, the harness beside it under its own name."""
    monkeypatch.setitem(sys.modules, "slipway_worker", slipway_worker)
    from evals.drift import items as found  # noqa: PLC0415 - only with the harness in place

    return found


def choice(**changed: Any) -> dict[str, Any]:  # noqa: ANN401 - lm-eval's record
    arguments = [("Q: two and two?\nA:", f" {word}") for word in ("four", "five")]
    resps = [[(-1.5, True)], [(-2.5, False)]]
    return {"doc_id": 3, "arguments": arguments, "resps": resps, "target": "0", "acc": 1.0, **changed}


def test_a_choice_keeps_lm_eval_s_own_score_and_the_part_it_is_of(items: ModuleType) -> None:
    found = ChoiceAnswer.model_validate(items.item("choice", ("mmlu_anatomy", choice()), TASK, None, MODEL))
    assert (found.id, found.group, found.answer, found.hit) == ("mmlu_anatomy/3", "mmlu_anatomy", 0, True)
    assert found.choices == ("four", "five")
    normed = items.item("choice", ("a", choice(acc_norm=0.0)), {**TASK, "metric": "acc_norm"}, None, MODEL)
    assert ChoiceAnswer.model_validate(normed).hit is False


@pytest.mark.parametrize(("target", "answer"), [(1, 1), ("1", 1), ("five", 1), (" four", 0)])
def test_the_right_choice_is_found_however_a_task_names_it(items: ModuleType, target: object, answer: int) -> None:
    assert items.item("choice", ("a", choice(target=target)), TASK, None, MODEL)["answer"] == answer


def test_a_row_of_ours_is_scored_by_its_answer(items: ModuleType) -> None:
    row = {"id": "types.py:6", "answer": 1}
    found = ChoiceAnswer.model_validate(items.item("choice", ("cloze", choice(acc=None)), TASK, row, MODEL))
    assert (found.id, found.right, found.hit) == ("types.py:6", None, False)


@pytest.mark.parametrize("score", [math.nan, -math.inf])
def test_a_log_probability_that_is_no_number_is_no_answer(items: ModuleType, score: float) -> None:
    record = choice(resps=[[(score, False)], [(-1.0, True)]])
    assert (
        ChoiceAnswer.model_validate(items.item("choice", ("a", record), TASK, {"id": "a", "answer": 0}, MODEL)).hit
        is None
    )


def test_text_is_counted_in_bytes(items: ModuleType) -> None:
    record = {"doc_id": 0, "arguments": [("höhe",)], "resps": [[-12.5, False]]}
    found = TextAnswer.model_validate(items.item("text", ("wikitext", record), TASK, None, MODEL))
    assert (found.bytes, found.log_likelihood) == (5, -12.5)


@pytest.mark.parametrize(("said", "hit", "tokens"), [("the answer is 4", True, 4), ("", False, 0)])
def test_what_is_written_is_counted_and_nothing_written_is_scored_as_lm_eval_scores_it(
    items: ModuleType, said: str, hit: bool, tokens: int
) -> None:
    record = {"doc_id": 0, "arguments": [("2 + 2?", {"until": []})], "resps": [[said]], "exact_match": float(hit)}
    found = GeneratedAnswer.model_validate(items.item("generated", ("gsm8k", record), TASK, None, MODEL))
    assert (found.hit, found.tokens, found.said) == (hit, tokens, said)


def test_a_score_between_right_and_wrong_is_refused(items: ModuleType) -> None:
    with pytest.raises(slipway_worker.WorkerError, match=r"`acc` of an item is 0\.4"):
        items.item("choice", ("a", choice(acc=0.4)), TASK, None, MODEL)


def results(**records: list[dict[str, Any]]) -> dict[str, Any]:
    kind = {"output_type": "generate_until"}
    return {"samples": records, "configs": dict.fromkeys(records, kind)}


def test_samples_are_of_the_filter_that_was_asked_for_part_by_part(items: ModuleType) -> None:
    found = results(
        b=[{"doc_id": 1, "filter": "strict"}, {"doc_id": 0, "filter": "strict"}],
        a=[{"doc_id": 0, "filter": "strict"}, {"doc_id": 0, "filter": "loose"}],
    )
    samples, kind = items.samples(found, {**TASK, "filter": "strict"}, "t")
    assert [(part, record["doc_id"]) for part, record in samples] == [("a", 0), ("b", 0), ("b", 1)]
    assert kind == "generated"
    with pytest.raises(slipway_worker.WorkerError, match="no filter `none`; there are loose, strict"):
        items.samples(found, {**TASK, "filter": "none"}, "t")


def test_two_askings_are_compared_by_item(items: ModuleType) -> None:
    row = {"id": "x", "answer": 0}
    first = [items.item("choice", ("a", choice()), TASK, row, MODEL)]
    second = [items.item("choice", ("a", choice(resps=[[(-2.6, False)], [(-2.5, True)]])), TASK, row, MODEL)]
    found = items.again(first, second)
    assert (found["items"], found["flips"], found["changed"]) == (1, 1, 1)
    assert found["largest"] == pytest.approx(1.1)
    assert TypeAdapter(int).validate_python(items.again(first, first)["flips"]) == 0


def test_what_was_asked_is_told_apart_down_to_its_examples(items: ModuleType) -> None:
    def asked(record: dict[str, Any]) -> str:
        found: str = items.item("choice", ("a", record), TASK, None, MODEL)["asked"]
        return found

    others = [("Q: one and one?\nA: two\nQ: two and two?\nA:", f" {word}") for word in ("four", "five")]
    assert asked(choice()) == asked(choice(target="1"))
    assert asked(choice()) != asked(choice(arguments=others))


def test_a_document_counts_for_overlap_from_its_beginning_and_an_item_with_each_of_its_choices(
    items: ModuleType,
) -> None:
    words = " ".join(f"word{number}" for number in range(1000))
    assert items.shown("text", ("a", {"arguments": [(words,)]})) == [words]
    ends = [" ".join(f"{letter}{number}" for number in range(8)) for letter in "xy"]
    shown = items.shown("choice", ("a", {"arguments": [(words, f" {end}") for end in ends]}))
    for end in ends:
        assert set(overlap.runs(f"word995 word996 word997 word998 word999 {end}")) & set().union(
            *map(overlap.runs, shown)
        )
    # Not with the examples before it, which every item shares.
    assert not overlap.runs(" ".join(words.split()[:20])) & set().union(*map(overlap.runs, shown))
