"""Tool calls: our requests, what makes a call right, and how they are paired."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.drift import tool_calls
from evals.drift.answers import GeneratedAnswer
from evals.drift.json_lines import CALLS, JsonLinesError, parse_rows
from evals.drift.limits import DriftLimits
from evals.drift.planning import check_data, plan
from evals.drift.suite import TASKS, TOOL_CALLS, TaskLimits
from evals.errors import SuiteError
from homes import DEMO

DATA = TASKS / "tool_calls.jsonl"
HELD_OUT = DEMO / "heldout.jsonl"
LIMITS: dict[str, Any] = {
    "tasks": {
        "cloze": {"data": __file__, "max_drop": 0.02},
        "perplexity": {"data": __file__, "max_increase": 0.01},
    }
}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return parse_rows(DATA.read_bytes(), DATA, CALLS)


def call(name: str, arguments: object) -> dict[str, Any]:
    """A call as vLLM's chat API returns it."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": "call-1", "type": "function", "function": {"name": name, "arguments": text}}


def test_our_requests_are_answered_right_by_what_they_expect(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 48
    assert len({row["prompt"] for row in rows}) == 48
    for row in rows:
        assert tool_calls.wrong(row, [call(row["name"], row["arguments"])]) is None, row["id"]


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ([], "0 calls"),
        ([call("convert_currency", "{}")] * 2, "2 calls"),
        ([call("get_weather", {"city": "Paris"})], "calls 'get_weather'"),
        ([call("convert_currency", "{'amount': 100}")], "the arguments are not JSON"),
        ([call("convert_currency", {"amount": 100, "source": "USD"})], "'target' is a required property"),
        ([call("convert_currency", {"amount": "100", "source": "USD", "target": "EUR"})], "is not of type 'number'"),
        (
            [call("convert_currency", {"amount": 100, "source": "USD", "target": "EUR", "x": 1})],
            "Additional",
        ),
        ([call("convert_currency", {"amount": 10, "source": "USD", "target": "EUR"})], "`amount` is 10"),
        ([call("convert_currency", [])], "is not of type 'object'"),
    ],
)
def test_a_wrong_call_says_why(rows: list[dict[str, Any]], calls: list[dict[str, Any]], said: str) -> None:
    row = next(row for row in rows if row["id"] == "convert_currency-1")
    problem = tool_calls.wrong(row, calls)
    assert problem is not None
    assert said in problem


def test_case_and_surrounding_space_of_a_text_do_not_count(rows: list[dict[str, Any]]) -> None:
    row = next(row for row in rows if row["id"] == "get_weather-1")
    assert tool_calls.wrong(row, [call("get_weather", {"city": " paris"})]) is None


def test_answers_are_of_the_form_that_is_paired(rows: list[dict[str, Any]]) -> None:
    def chat(body: dict[str, Any]) -> dict[str, Any]:
        assert body["tool_choice"] == "auto"
        assert body["temperature"] == 0
        row = next(row for row in rows if row["prompt"] == body["messages"][0]["content"])
        right = row["name"] != "multiply"
        message = {"content": "56" if not right else None, "tool_calls": [call(row["name"], row["arguments"])] * right}
        return {"choices": [{"message": message}], "usage": {"completion_tokens": 21}}

    found = [GeneratedAnswer.model_validate(tool_calls.answer(row, chat)) for row in rows]
    assert sum(each.right for each in found) == 42
    assert [each.id for each in found] == [row["id"] for row in rows]
    assert len({each.identity for each in found}) == 48
    wrong = next(each for each in found if not each.right)
    assert wrong.said == "56 (0 calls)"


def test_a_parser_of_tool_calls_adds_our_requests_to_the_suite() -> None:
    limits = DriftLimits.model_validate(LIMITS)
    added = limits.with_tool_calls()
    assert added.tasks[TOOL_CALLS].tier == "supporting"
    assert added.digest != limits.digest
    assert added.with_tool_calls() == added
    own = {"tasks": {**LIMITS["tasks"], "calls": {"task": TOOL_CALLS, "data": __file__, "max_drop": 0.1}}}
    assert DriftLimits.model_validate(own).with_tool_calls().tasks.keys() == {"cloze", "perplexity", "calls"}
    with pytest.raises(ValueError, match="`calls` asks for tool calls, which need `engine: served`"):
        DriftLimits.model_validate({**own, "engine": "hf"})
    hf = DriftLimits.model_validate({**LIMITS, "engine": "hf"})
    assert hf.with_tool_calls() == hf


def test_a_row_that_expects_a_tool_that_is_not_given_is_refused(rows: list[dict[str, Any]]) -> None:
    broken = json.dumps({**rows[0], "name": "fly"}).encode()
    with pytest.raises(JsonLinesError, match="`name` must be the name of one of the tools"):
        parse_rows(broken, Path("calls.jsonl"), CALLS)


def test_requests_of_a_model_file_are_checked_with_it_and_planned(tmp_path: Path) -> None:
    own = tmp_path / "calls.jsonl"
    limits = TaskLimits(task=TOOL_CALLS, data=own, max_drop=0.02)
    asked = DriftLimits(tasks={"calls": limits, "text": TaskLimits(data=HELD_OUT, task="perplexity", max_increase=0.1)})
    own.write_bytes(DATA.read_bytes())
    check_data(asked)
    assert next((each.name, each.kind, each.items) for each in plan(asked)) == ("calls", "generated", 48)
    own.write_text('{"id": "1", "prompt": "Call me", "tools": [], "name": "call", "arguments": {}}\n')
    with pytest.raises(SuiteError, match=r"calls\.jsonl, line 1: `tools` must be a list of tools"):
        check_data(asked)
