"""The cost of a suite and the losses that it can detect, before anything is asked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.drift import json_lines
from evals.drift.limits import DriftLimits
from evals.drift.suite import IMAGES, TOOL_CALLS, Kind, TaskLimits
from evals.errors import SuiteError
from evals.statistics import paired

# The share of items that flip between FP16 and four bits, as published and as measured (docs/explanation/drift.md).
FLIPS = (0.02, 0.05, 0.10)
TYPICAL = FLIPS[1]
# How far documents differ in their increase of bits per byte under four bits: one standard deviation, measured on the
# demo.
SPREAD = 0.005
POWER = 0.8
_SHAPES: Mapping[Kind, json_lines.Shape] = {
    "choice": json_lines.CHOICES, "text": json_lines.DOCUMENTS, "generated": json_lines.NAMED,
}  # fmt: skip
_OWN_SHAPES = {TOOL_CALLS: json_lines.CALLS, IMAGES: json_lines.IMAGES}
_BYTES_A_TOKEN = 4  # English and code under common tokenizers; a plan needs no tokenizer
_IMAGE_TOKENS = 256  # of an image of 896 pixels a side in Gemma 3; other models take some tens to thousands


@dataclass(frozen=True)
class TaskPlan:
    """One task: its size, about how many tokens it takes, and the losses that it can detect.

    ``detectable`` is the smallest true loss that is detected with `POWER` at each share of flips in `FLIPS` (for
    likelihood one value, at `SPREAD`); ``wanted`` is how many items detect a loss of the limit at `TYPICAL` flips.
    """

    name: str
    tier: str
    kind: Kind
    items: int
    groups: int
    tokens: int
    limit: float
    detectable: tuple[float, ...]
    wanted: int

    @property
    def can_decide(self) -> bool:
        """Whether a loss as large as the limit would be detected, at the usual share of flips."""
        return self.items >= self.wanted


def plan(limits: DriftLimits) -> list[TaskPlan]:
    """Return the plan of every task.

    Raises:
        SuiteError: data cannot be read, or a task of lm-eval's does not state its size.
    """
    return [_task(name, task, limits.confidence) for name, task in limits.tasks.items()]


def check_data(limits: DriftLimits) -> None:
    """Check every row of our own tasks' data.

    Raises:
        SuiteError: a file can't be read, or a row is not valid for its task; the message names file and line.
    """
    for name, task in limits.tasks.items():
        if task.data is not None:
            _ours(name, task, task.data)


def _task(name: str, task: TaskLimits, confidence: float) -> TaskPlan:
    kind = _kind(name, task)
    items, tokens = _ours(name, task, task.data) if task.data is not None else _theirs(name, task)
    if task.max_drop is not None:
        found = tuple(paired.detectable_drop(rate, items, confidence, POWER) for rate in FLIPS)
        wanted = paired.items_to_detect(TYPICAL, task.max_drop, confidence, POWER) if task.max_drop else items + 1
        limit = task.max_drop
    else:
        limit = task.max_increase or 0.0
        # Of a mean over documents: the smallest shift is the one whose z is the sum of both errors' quantiles.
        found = (paired.detectable_shift(SPREAD, items, confidence, POWER),)
        wanted = max(2, round(items * (found[0] / limit) ** 2)) if limit else items + 1
    return TaskPlan(name, task.tier, kind, items, task.groups, tokens, limit, found, wanted)


def _kind(name: str, task: TaskLimits) -> Kind:
    if task.asks_for_tool_calls(name):
        return "generated"
    return task.kind or ("text" if task.max_increase is not None else "choice")


def _theirs(name: str, task: TaskLimits) -> tuple[int, int]:
    if task.size is None:
        raise SuiteError(f"`evals.tasks.{name}` needs `size`, how many items it has, to be planned without asking")
    items = min(task.size, task.items * task.groups) if task.items else task.size
    return items, items * (task.tokens or 0)


def _ours(name: str, task: TaskLimits, data: Path) -> tuple[int, int]:
    shape = _OWN_SHAPES.get(task.task or name) or _SHAPES[_kind(name, task)]
    try:
        rows = json_lines.read_rows(data, shape)
    except json_lines.JsonLinesError as error:
        raise SuiteError(f"the data of `evals.tasks.{name}`: {error}") from error
    items = task.items or len(rows)
    if items > len(rows):
        raise SuiteError(f"`evals.tasks.{name}` asks for {items} items; {data.name} has {len(rows)}")
    asked = sum(len(text.encode()) for row in rows for text in _prompts(row)) * items // len(rows) // _BYTES_A_TOKEN
    return items, asked + (items * _IMAGE_TOKENS if task.shows_images(name) else 0)


def _prompts(row: dict[str, Any]) -> Iterator[str]:
    """Yield the texts that one row sends: a document, a context with each of its choices, or what follows an image."""
    if "image" in row:
        yield "\n".join([row["question"], *row["choices"]])
    elif "choices" in row:
        yield from (row["context"] + choice for choice in row["choices"])
    elif "text" in row:
        yield row["text"]
    else:  # a question to answer at length: its task says which keys it puts
        yield json.dumps(row)
