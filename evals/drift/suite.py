"""Suites: tasks of lm-eval and of ours, in tiers, each with the loss that is allowed.

A suite is a file in ``evals/drift/suites/``; a model's file names one, changes some of its limits, or lists its own
tasks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from evals.errors import SuiteError
from registry.suggestions import suggestion

TASKS = Path(__file__).with_name("tasks")
SUITES = Path(__file__).with_name("suites")
TOOL_CALLS = "tool_calls"
"""Our task that a server with a parser of tool calls is asked; `tool_calls.jsonl` beside it has our own requests."""
IMAGES = "images"
"""Our task of questions about images; `builtin:images` has our own."""

# How a failed or inconclusive task affects the release; see `evals.drift.drift_gate`.
Tier = Literal["critical", "supporting", "advisory"]
Kind = Literal["choice", "generated", "text"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Question(_Frozen):
    """What determines the question of a task: everything but the limits, the tier and what plans need."""

    task: str
    ours: bool
    items: int | None
    metric: str | None
    filter: str | None
    fewshot: int | None
    chat_template: bool
    metadata: Mapping[str, str]


class TaskLimits(_Frozen):
    """One task: what it asks, how, its tier, and the loss that is allowed."""

    task: str | None = None
    """The task's name in lm-eval, or one of ours (`cloze`, `images`, `perplexity`, `tool_calls`); the key where it is
    left out.
    """
    data: Path | None = None
    """The file that one of our tasks asks, as `file:PATH`; `builtin:cloze`, `builtin:heldout` and `builtin:images` come
    with Slipway.
    """
    items: Annotated[int, Field(gt=0)] | None = None
    """How many items are asked: of our tasks spread over the file, of lm-eval's the first of each part."""
    metric: str | None = None
    """The metric of lm-eval's task, where it has several."""
    filter: str | None = None
    """The filter of lm-eval's task, where it has several."""
    fewshot: Annotated[int, Field(ge=0)] | None = None
    """How many examples precede each item."""
    chat_template: bool = False
    """Whether the model's chat template is used."""
    metadata: Mapping[str, str] = {}
    """Further settings of lm-eval's task."""
    kind: Kind | None = None
    """How the task is asked, for plans: by choices, written answers, or the likelihood of text."""
    size: Annotated[int, Field(gt=0)] | None = None
    """The number of items, for plans."""
    groups: Annotated[int, Field(gt=0)] = 1
    """The number of groups of items, for plans and for intervals."""
    tokens: Annotated[int, Field(gt=0)] | None = None
    """About how many tokens an item takes, for plans."""
    tier: Tier = "critical"
    """Its weight: a `critical` task must be shown to be within its limit, a `supporting` one must not be shown to fail,
    an `advisory` one is only reported.
    """
    max_drop: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The greatest drop in accuracy, absolute: 0.02 is two points."""
    max_increase: Annotated[float, Field(ge=0)] | None = None
    """The greatest increase in bits per byte, relative: 0.01 is one percent."""

    @model_validator(mode="after")
    def _one_limit(self) -> TaskLimits:
        if (self.max_drop is None) == (self.max_increase is None):
            raise ValueError("give either `max_drop` (accuracy, absolute) or `max_increase` (bits per byte, relative)")
        return self

    def is_ours(self, name: str) -> bool:
        """Whether the task is one of ``evals/drift/tasks``, over a file of data."""
        return self.data is not None or (self.task or name) in task_names()

    def asks_for_tool_calls(self, name: str) -> bool:
        """Whether the task is ours that offers tools."""
        return (self.task or name) == TOOL_CALLS

    def shows_images(self, name: str) -> bool:
        """Whether the task is ours with images."""
        return (self.task or name) == IMAGES

    def question(self, name: str) -> Question:
        """Return what determines the question."""
        return Question(
            task=self.task or name,
            ours=self.is_ours(name),
            items=self.items,
            metric=self.metric,
            filter=self.filter,
            fewshot=self.fewshot,
            chat_template=self.chat_template,
            metadata=self.metadata,
        )


class Suite(_Frozen):
    """A file in ``evals/drift/suites``: tasks under one name; ``seed`` draws the few-shot examples."""

    suite: str
    about: str
    seed: int = 1234
    tasks: Annotated[Mapping[str, TaskLimits], Field(min_length=1)]


def load_suite(name: str) -> Suite:
    """Return a suite, its data's paths made absolute.

    Raises:
        ValueError: there is no such suite.
    """
    if name not in suite_names():
        raise ValueError(f"unknown suite `{name}`{suggestion(name, suite_names())}")
    path = SUITES / f"{name}.yaml"
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    for task in document["tasks"].values():
        if "data" in task:
            task["data"] = (path.parent / task["data"].removeprefix("file:")).resolve()
    return Suite.model_validate(document)


def suite_names() -> list[str]:
    """Return the suites that there are."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def task_names() -> list[str]:
    """Return our own tasks; lm-eval's are known to lm-eval alone."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


class AskedTasks(_Frozen):
    """The part of a model's ``evals`` section that selects the questions: a suite's name, and tasks.

    With a ``suite``, ``tasks`` change single keys of its tasks or add tasks; without one they are all there is.
    """

    suite: str | None = None
    """The name of a suite in `evals/drift/suites`."""
    seed: int = 1234
    """Draws the few-shot examples."""
    tasks: Annotated[Mapping[str, TaskLimits], Field(min_length=1)]
    """Tasks by name; beside a suite they change single keys of its tasks or add tasks, without one they are all there
    is.
    """

    @model_validator(mode="before")
    @classmethod
    def _from_suite(cls, given: Any) -> Any:  # noqa: ANN401 - what the file holds, not yet checked
        if not isinstance(given, dict) or not isinstance(given.get("suite"), str):
            return given
        suite = load_suite(given["suite"])
        tasks = {name: task.model_dump(exclude_unset=True) for name, task in suite.tasks.items()}
        changed = given.get("tasks")
        if changed is not None and not isinstance(changed, dict):
            return given
        for name, change in (changed or {}).items():
            tasks[name] = {**tasks.get(name, {}), **change} if isinstance(change, dict) else change
        return {"seed": suite.seed, **given, "tasks": tasks}

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: Mapping[str, TaskLimits]) -> Mapping[str, TaskLimits]:
        for name, task in tasks.items():
            asked, ours = task.task or name, task_names()
            if task.data is not None and asked not in ours:
                raise ValueError(f"unknown task `{asked}` over a file of data{suggestion(asked, ours)}")
            if asked in ours and task.data is None:
                raise ValueError(f"`{name}` needs `data`: the file with its items")
        return tasks

    @property
    def digest(self) -> str:
        """``sha256:…`` of what is asked, as it is defined: tasks, templates, few-shot, seed, items; not of the data."""
        asked = {name: task.question(name).model_dump(mode="json") for name, task in sorted(self.tasks.items())}
        for question in asked.values():
            if question["ours"]:
                definition = TASKS / f"{question['task']}.yaml"
                question["definition"] = hashlib.sha256(definition.read_bytes()).hexdigest()
        text = json.dumps({"seed": self.seed, "tasks": asked}, sort_keys=True, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    @property
    def name(self) -> str:
        """The suite's name; of tasks listed in the model's file, that they are."""
        return self.suite or "the model's own tasks"


def questions(asked: AskedTasks) -> dict[str, object]:
    """Return what determines the answers, for their cache key: the suite's digest, and that of each file of data.

    A changed limit does not change it.

    Raises:
        SuiteError: if data cannot be read.
    """
    data = {name: _data_sha256(name, task.data) for name, task in sorted(asked.tasks.items()) if task.data is not None}
    return {"suite": asked.digest, "data": data}


def _data_sha256(name: str, data: Path) -> str:
    try:
        return hashlib.sha256(data.read_bytes()).hexdigest()
    except OSError as error:
        raise SuiteError(f"the data of task `{name}`, {data}, cannot be read: {error.strerror}") from error
