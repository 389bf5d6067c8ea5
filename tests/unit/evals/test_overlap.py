"""Calibration hygiene: thirteen words in a row count, whatever stands between them, and nothing less does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from evals.drift.answers import Answers
from evals.drift.asking import overlapping
from evals.drift.overlap import WORDS, pooled, runs
from evals.errors import AnswersError

LINE = "def wave(self, data): return self.size_read + len(data) if self.align else None # twelve and more words in here"


def test_the_same_words_in_other_clothes_overlap() -> None:
    assert runs(LINE) & pooled(["x = 1\n" + LINE.upper().replace(" ", "\n\t") + "\ny = 2"])


def test_twelve_words_in_a_row_do_not() -> None:
    words = [f"w{number}" for number in range(40)]
    assert not runs(" ".join(words)) & pooled([" ".join(words[: WORDS - 1])])
    assert runs(" ".join(words)) & pooled([" ".join(words[:WORDS])])


def test_a_short_item_is_taken_whole_and_a_tiny_one_says_nothing() -> None:
    short = "one two three four five six seven eight nine"
    assert runs(short) & pooled([f"zero {short} ten eleven"])
    assert not runs("return None")


def test_no_run_goes_from_one_text_into_the_next() -> None:
    words = [f"w{number}" for number in range(20)]
    assert not runs(" ".join(words)) & pooled([" ".join(words[:7]), " ".join(words[7:14])])


def test_items_are_named_by_what_the_worker_left(tmp_path: Path) -> None:
    items = [{"id": f"i{number}", "bytes": 10, "log_likelihood": -1.0} for number in range(3)]
    answers = Answers.model_validate(
        {
            "schema": "slipway.answers/2", "engine": {}, "suite": {"name": "s", "digest": "d", "lm_eval": "0"},
            "tasks": {"text": {"kind": "text", "data_sha256": "x", "items": items}},
        }
    )  # fmt: skip
    with pytest.raises(AnswersError, match="evaluate the model again"):
        overlapping(answers, tmp_path, [LINE])
    hashes = sorted(runs(LINE))
    np.savez(
        tmp_path / "runs.npz",
        allow_pickle=False,
        **{"text.runs": np.array([7, *hashes], dtype=np.uint64), "text.items": np.array([0] + [2] * len(hashes))},
    )
    assert overlapping(answers, tmp_path, [LINE]) == {"text": ["i2"]}
    assert overlapping(answers, tmp_path, ["other words entirely " * 10]) == {"text": []}
