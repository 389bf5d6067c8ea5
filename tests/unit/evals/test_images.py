"""Questions about images: the built-in pictures, the rows of a file, and the answers that are paired."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from evals import builtin
from evals.builtin import make_images
from evals.drift import images
from evals.drift.answers import ChoiceAnswer
from evals.drift.asking import TaskRequest
from evals.drift.json_lines import IMAGES, JsonLinesError, parse_rows
from evals.drift.limits import DriftLimits
from evals.drift.planning import plan

DATA = builtin.FILES["images"]
HELD_OUT = builtin.FILES["heldout"]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return parse_rows(DATA.read_bytes(), DATA, IMAGES)


def test_the_pictures_are_those_that_the_script_draws(rows: list[dict[str, Any]]) -> None:
    for row, item in zip(rows, make_images.items(), strict=True):
        assert (row["id"], row["question"], row["answer"]) == (item.id, item.question, item.answer)
        assert row["choices"] == list(item.choices)
        shown = Image.open(io.BytesIO(base64.b64decode(row["image"])))
        assert shown.convert("RGB").tobytes() == make_images.draw(item.shapes).convert("RGB").tobytes(), item.id


def test_each_question_has_one_right_answer_and_no_letter_is_more_often_right() -> None:
    for item in make_images.items():
        kind, right = item.id.partition("-")[0], item.choices[item.answer]
        assert len(set(item.choices)) == 4, item.id
        assert len({shape.cell for shape in item.shapes}) == len(item.shapes), item.id
        fitting = {
            "count": [shape for shape in item.shapes if shape.kind in item.question],
            "color": [shape for shape in item.shapes if shape.kind in item.question and shape.color == right],
            "shape": [shape for shape in item.shapes if shape.color in item.question and shape.kind == right],
            "place": [shape for shape in item.shapes if f"{shape.color} {shape.kind}" in item.question],
        }[kind]
        assert len(fitting) == (int(right) if kind == "count" else 1), item.id
        if kind == "place":
            column, row = fitting[0].cell
            assert right == f"{('top', '', 'bottom')[row]} {('left', '', 'right')[column]}"
    answers = Counter((item.id.partition("-")[0], item.answer) for item in make_images.items())
    assert set(answers.values()) == {make_images.ITEMS // 4}


@pytest.mark.parametrize("wanted", [20, 40, 60, 80, 120])
def test_a_part_of_the_items_has_every_letter(wanted: int, rows: list[dict[str, Any]]) -> None:
    """As the worker chooses them: spread evenly over the file."""
    chosen = Counter(rows[index * len(rows) // wanted]["answer"] for index in range(wanted))
    assert chosen.keys() == {0, 1, 2, 3}
    assert max(chosen.values()) < wanted * 0.5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image": "iVBORw0KGgo="}, "`image` must be a PNG in base64, of at most 4096 pixels a side, found"),
        ({"image": "not base64!"}, "`image` must be a PNG"),
        ({"image": base64.b64encode(b"GIF89a" + bytes(60)).decode()}, "`image` must be a PNG"),
        ({"image": 7}, "`image` must be a PNG"),
        ({"choices": ["one"], "answer": 0}, "`choices` must be a list of at least two texts"),
        ({"choices": [str(number) for number in range(27)]}, "`choices` must be at most 26 texts"),
        ({"answer": 4}, "`answer` must be the place of a choice"),
        ({"question": ""}, "`question` must be a text"),
    ],
)
def test_a_row_that_can_not_be_asked_is_refused(
    rows: list[dict[str, Any]], changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(JsonLinesError, match=rf"images\.jsonl, line 1: {reason}"):
        parse_rows(json.dumps({**rows[0], **changes}).encode(), Path("images.jsonl"), IMAGES)


def test_an_image_of_too_many_pixels_is_refused_by_what_its_head_says(rows: list[dict[str, Any]]) -> None:
    picture = io.BytesIO()
    Image.new("1", (4097, 1)).save(picture, "PNG")
    wide = {**rows[0], "image": base64.b64encode(picture.getvalue()).decode()}
    with pytest.raises(JsonLinesError, match="at most 4096 pixels a side"):
        parse_rows(json.dumps(wide).encode(), Path("images.jsonl"), IMAGES)


def test_the_answer_is_the_likeliest_letter(rows: list[dict[str, Any]]) -> None:
    asked: list[tuple[str, str]] = []

    def score(image: str, text: str, letters: Sequence[str]) -> list[float]:
        asked.append((image, text))
        assert list(letters) == ["A", "B", "C", "D"]
        return [-3.0, float("nan"), -2.0, -1.0] if image == rows[1]["image"] else [-3.0, -1.5, -2.0, -1.0]

    known = [{**row, "answer": answer} for row, answer in zip(rows[:3], (3, 0, 1), strict=True)]
    found = [ChoiceAnswer.model_validate(images.answer(row, score)) for row in known]
    assert asked[0] == (
        rows[0]["image"],
        f"{rows[0]['question']}\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer with the letter only.",
    )
    assert [each.chosen for each in found] == [3, None, 3]
    assert [each.hit for each in found] == [True, None, False]
    assert found[0].said == "4"


def test_another_image_under_the_same_question_is_another_item(rows: list[dict[str, Any]]) -> None:
    def score(_image: str, _text: str, letters: Sequence[str]) -> list[float]:
        return [0.0 for _ in letters]

    one, other = ({**rows[0], "image": rows[number]["image"]} for number in (0, 1))
    assert images.answer(one, score)["asked"] != images.answer(other, score)["asked"]


def test_only_our_own_task_shows_images() -> None:
    def task(name: str, *, ours: bool) -> TaskRequest:
        return TaskRequest(
            task=name, ours=ours, items=None, metric=None, filter=None, fewshot=None, chat_template=False, metadata={},
            data=None,
        )  # fmt: skip

    theirs = task("mmlu", ours=False)
    assert images.are_asked({"shapes": task("images", ours=True), "mmlu": theirs})
    assert not images.are_asked({"images": task("cloze", ours=True), "mmlu": theirs})


class Tokenizer:
    """Has a token for each letter but X."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [1, 2] if text == "X" else [ord(text)]


def test_a_letter_is_scored_by_its_own_token() -> None:
    assert images.tokens(Tokenizer(), "AB") == [65, 66]
    with pytest.raises(ValueError, match="no single token for 'X'"):
        images.tokens(Tokenizer(), "AX")


def test_a_task_with_images_is_planned_by_its_items() -> None:
    limits = DriftLimits.model_validate(
        {
            "tasks": {
                "shapes": {"task": "images", "data": DATA, "items": 100, "max_drop": 0.05},
                "text": {"task": "perplexity", "data": HELD_OUT, "max_increase": 0.02},
            }
        }
    )
    shapes = plan(limits)[0]
    assert (shapes.name, shapes.kind, shapes.items) == ("shapes", "choice", 100)
    assert 256 * 100 < shapes.tokens < 300 * 100
    assert limits.image_tasks == ["evals.tasks.shapes"]
