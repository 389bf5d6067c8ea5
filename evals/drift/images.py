"""Questions about images with lettered choices: beside the worker that asks them, of a server or of the HF backend.

The model sees the image and the question by its chat template. It is not asked to write: what counts is how likely
each choice's letter is as the first token of its reply.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evals.drift.asking import TaskRequest
    from evals.drift.items import ItemAnswer

Row = Mapping[str, Any]
# From an image (a PNG in base64), a text, and the letters to each letter's log-probability; NaN where there is none.
Score = Callable[[str, str, Sequence[str]], Sequence[float]]

TYPE = "image_choice"
_QUESTION, _CHOICE = 500, 200  # characters that are kept for a person to read


def are_asked(tasks: Mapping[str, TaskRequest]) -> bool:
    """Whether one of a request's tasks shows images."""
    return any(task["ours"] and task["task"] == "images" for task in tasks.values())


def answer(row: Row, score: Score) -> ItemAnswer:
    """Ask a row and return its answer, as `evals.drift.answers.ChoiceAnswer` has it."""
    letters, text = ascii_uppercase[: len(row["choices"])], prompt(row)
    return {
        "id": row["id"],
        "asked": hashlib.sha256(json.dumps([row["image"], text]).encode()).hexdigest()[:16],
        "answer": row["answer"],
        "log_likelihoods": [each if math.isfinite(each) else None for each in score(row["image"], text, letters)],
        "right": None,
        "question": row["question"][-_QUESTION:],
        "choices": [choice[:_CHOICE] for choice in row["choices"]],
    }


def prompt(row: Row) -> str:
    """Return the text that follows the image."""
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, row["choices"], strict=False))
    return f"{row['question']}\n{choices}\nAnswer with the letter only."


def tokens(tokenizer: Any, letters: Sequence[str]) -> list[int]:  # noqa: ANN401 - of transformers, which is untyped here
    """Return the token of each letter, as it begins a text.

    Raises:
        ValueError: a letter is not one token.
    """
    found = [tokenizer.encode(letter, add_special_tokens=False) for letter in letters]
    if several := [letter for letter, encoded in zip(letters, found, strict=True) if len(encoded) != 1]:
        raise ValueError(f"the tokenizer has no single token for {several[0]!r}, so a choice can't be scored")
    return [token for (token,) in found]
