from __future__ import annotations

import json
from pathlib import Path

import pytest

from evals.drift import json_lines
from evals.drift.json_lines import CHOICES, DOCUMENTS, TEXTS, JsonLinesError, Shape, parse_rows, read_rows

CHOICE = {"id": "a", "context": "x", "choices": ["y", "z"], "answer": 1}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c"])
def test_a_line_ends_with_a_newline_alone(separator: str, data: Path) -> None:
    row = {"text": f"one{separator if ord(separator) > 0x1F else ''}two"}
    data.write_text(json.dumps(row, ensure_ascii=False) + "\n" + json.dumps({"text": "three"}) + "\n", encoding="utf-8")
    assert read_rows(data, TEXTS) == [row, {"text": "three"}]


@pytest.mark.parametrize("written", ["\ufeff", "\n\n", "\ufeff\n \n", "\r\n"])
def test_a_mark_and_blank_lines_are_allowed_and_lines_are_counted_with_them(written: str, data: Path) -> None:
    data.write_bytes(written.encode() + b'{"text": "a"}\r\n\n{"text": "b"}\nno json\n')
    assert read_rows(data, TEXTS, 2) == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(JsonLinesError, match=rf"data\.jsonl, line {written.count(chr(10)) + 4}: no JSON"):
        read_rows(data, TEXTS)


@pytest.mark.parametrize(
    ("shape", "row", "reason"),
    [
        (TEXTS, {"txt": "a"}, "line 2: `text` is missing: expected an object with `text`, found `txt`"),
        (TEXTS, ["a"], "line 2: expected an object with `text`, found"),
        (TEXTS, {"text": 3}, "`text` must be a text, found 3"),
        (DOCUMENTS, {"id": 7, "text": "a"}, "`id` must be a text, found 7"),
        (CHOICES, {**CHOICE, "id": "b", "choices": "yz"}, "`choices` must be a list of at least two texts"),
        (CHOICES, {**CHOICE, "id": "b", "answer": 2}, "`answer` must be the place of a choice, from 0 on, found 2"),
        (CHOICES, {**CHOICE, "id": "b", "answer": "y"}, "`answer` must be the place of a choice"),
        (CHOICES, {"id": "b", "question": "x"}, "`context` is missing: .*found `id`, `question`"),
        (CHOICES, CHOICE, "line 2: `id` 'a' is that of line 1 too"),
    ],
)
def test_a_row_is_checked_as_it_is_loaded(shape: Shape, row: object, reason: str, data: Path) -> None:
    good = {"id": "a", "text": "t", **CHOICE}
    data.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(JsonLinesError, match=reason):
        read_rows(data, shape)


@pytest.mark.parametrize("content", [b'{"text": "\xff"}', b"[" * 100_000, b"{"])
def test_what_is_no_json_is_told_with_its_line(content: bytes, data: Path) -> None:
    with pytest.raises(JsonLinesError, match=r"data\.jsonl, line 1: no JSON"):
        parse_rows(content, data, TEXTS)


def test_a_file_that_is_not_there_is_named(data: Path) -> None:
    with pytest.raises(JsonLinesError, match=r"can't read .*data\.jsonl: No such file"):
        read_rows(data, TEXTS)


def test_every_kind_of_task_of_ours_has_a_shape() -> None:
    tasks = Path(json_lines.__file__).parent / "tasks"
    for path in tasks.glob("*.yaml"):
        (output_type,) = (line.split()[1] for line in path.read_text().splitlines() if line.startswith("output_type:"))
        assert output_type in json_lines.SHAPES
