"""Calibration data: which samples a section of a model file draws, and which blocks a quantizer makes of them."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from checkout import CHECKOUT
from homes import DEMO
from pipeline.errors import QuantizeError
from pipeline.quantization import calibration_data
from pipeline.quantization.calibration_data import Sample, shares, texts
from pipeline.spec import Calibration, WeightedData
from registry.digests import digest_file

CHAT = [
    {"role": "user", "content": "What is a lock?"},
    {"role": "assistant", "content": "A file with digests."},
    {"role": "user", "content": "Of what?"},
    {"role": "assistant", "content": "Of each file of a source."},
]


def data(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"file:{path}"


def draw(section: Calibration) -> list[Sample]:
    return calibration_data.draw(section, [[each.path] for each in section.data])


def digest(section: Calibration) -> str:
    return calibration_data.digest(section, [digest_file(each.path) for each in section.data])


def mixture(folder: Path, **more: Any) -> Calibration:  # noqa: ANN401
    first = data(folder, "texts", [{"text": f"text {number}"} for number in range(100)])
    second = data(folder, "chats", [{"messages": CHAT, "source": "x"} for _ in range(100)])
    return Calibration(mixture=(WeightedData(uri=first, weight=3), WeightedData(uri=second)), **more)


def test_a_mixture_gives_each_source_its_share_and_always_the_same_samples(tmp_path: Path) -> None:
    drawn = draw(mixture(tmp_path, samples=40))
    assert Counter(isinstance(each, str) for each in drawn) == {True: 30, False: 10}
    assert drawn == draw(mixture(tmp_path, samples=40))
    assert len({each for each in drawn if isinstance(each, str)}) == 30
    assert {len(each) for each in drawn if not isinstance(each, str)} == {4}
    assert "Of what?" in set(texts(drawn))


def test_the_digest_of_a_mixture_covers_its_data_and_its_weights(tmp_path: Path) -> None:
    first = mixture(tmp_path)
    heavier = first.model_copy(
        update={"mixture": (first.mixture[0], first.mixture[1].model_copy(update={"weight": 2}))}
    )
    assert digest(heavier) != digest(first)
    before = digest(first)
    data(tmp_path, "chats", [{"messages": CHAT}])
    assert digest(first) != before


@pytest.mark.parametrize(
    ("weights", "total", "expected"), [([1, 1, 1], 10, [4, 3, 3]), ([3, 1], 40, [30, 10]), ([1e-9, 1], 5, [0, 5])]
)
def test_shares_are_whole_and_add_up(weights: list[float], total: int, expected: list[int]) -> None:
    assert shares(weights, total) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "line 1: `messages` must be a list of messages"),
        ({"messages": [{"role": "user"}]}, "line 1: `messages` must be a list of messages"),
        ({"conversation": CHAT}, "line 1: `text` is missing"),
        ({"text": "one row"}, "has 1 rows, but 30 are needed"),
    ],
)
def test_a_wrong_row_of_a_mixture_is_refused_by_the_path_of_its_key(
    row: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    section = mixture(tmp_path, samples=40)
    data(tmp_path, "texts", [row])
    with pytest.raises(QuantizeError, match=rf"^`calibration\.mixture\.0\.uri`: .*{reason}"):
        draw(section)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the workers, with a chat template in the place of transformers, which is not installed here."""
    monkeypatch.syspath_prepend(CHECKOUT / "pipeline" / "workers")
    found = importlib.import_module("pipeline.quantization.quantizers.calibration_blocks")

    def render(messages: list[dict[str, str]]) -> str:
        return "".join(f"<{message['role']}> {message['content']}\n" for message in messages)

    monkeypatch.setattr(found, "_renderer", lambda *_: render)
    return found


def request(samples: list[Any], max_tokens: int) -> dict[str, Any]:
    return {
        "source": str(DEMO / "model"), "calibration": "chats.jsonl", "texts": samples, "chat_template": None,
        "max_tokens": max_tokens,
    }  # fmt: skip


def decoded(made: list[list[int]]) -> list[str]:
    from tokenizers import Tokenizer  # noqa: PLC0415

    tokenizer = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))
    return [tokenizer.decode(block, skip_special_tokens=False) for block in made]


def test_no_message_is_cut_and_no_block_is_padded(blocks: ModuleType) -> None:
    lines: list[str] = []
    made = blocks.calibration_blocks(request([CHAT] * 40, 100), lines.append).blocks
    assert all(0 not in block and 50 < len(block) <= 100 for block in made)
    for text in decoded(made):
        assert text.count("<user> What is a lock?\n") == text.count("<user>") - text.count("<user> Of what?\n") > 0
        assert text.endswith((".\n", "Of what?\n"))
    assert lines == []


def test_the_last_messages_of_a_long_conversation_are_left_out_with_a_warning(blocks: ModuleType) -> None:
    lines: list[str] = []
    long = [*CHAT[:2], {"role": "user", "content": "again and " * 200}]
    made = blocks.calibration_blocks(request([long] * 40, 100), lines.append)
    assert all("again" not in text and "A file with digests." in text for text in decoded(made.blocks))
    assert made.used == {"tokens": sum(map(len, made.blocks)), "cut": 40, "empty": 0}
    assert lines[0] == (
        "warning: 100% of 40 calibration samples are longer than `calibration.max_tokens`, 100, and were cut: raise it"
    )


def test_instructions_alone_are_no_conversation(blocks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates such as Qwen 3.5's refuse messages of which none is the user's."""
    render = blocks._renderer()

    def strict(messages: list[dict[str, str]]) -> str:
        assert any(message["role"] == "user" for message in messages)
        return str(render(messages))

    monkeypatch.setattr(blocks, "_renderer", lambda *_: strict)
    rules = {"role": "system", "content": "Answer in one sentence."}
    endless = [rules, {"role": "user", "content": "again and " * 200}, CHAT[1]]
    long = [rules, *CHAT, {"role": "user", "content": "again and " * 200}]
    made = blocks.calibration_blocks(request([*[endless] * 20, *[long] * 40], 100), lambda _: None)
    assert made.cut == 60
    for text in decoded(made.blocks):
        assert "again" not in text
        assert text.count("<system>") == text.count("<user> What is a lock?") == text.count("Of each file") > 0


def test_texts_fill_what_conversations_leave(blocks: ModuleType) -> None:
    lines: list[str] = []
    made = blocks.calibration_blocks(request([CHAT, *["a word " * 40] * 20], 200), lines.append)
    assert {len(block) for block in made.blocks} == {200}
    assert lines == []


def test_mostly_empty_samples_are_a_warning(blocks: ModuleType) -> None:
    lines: list[str] = []
    made = blocks.calibration_blocks(
        request([*[""] * 9, "a word " * 100, "a word " * 100, "b " * 400], 600), lines.append
    )
    assert lines == ["warning: 75% of 12 calibration samples hold no token: use other data"]
    assert (made.cut, made.empty) == (0, 9)
