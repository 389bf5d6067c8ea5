"""The `evals` section of a model's file: the questions, the engine, and the loss that is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from evals.drift.suite import TASKS, TOOL_CALLS, AskedTasks, TaskLimits

NO_BASELINE = "no-baseline"
# Why a drift verdict can be inconclusive; `evals.drift.drift_gate.judge` says when.
CAUSES = frozenset(
    {
        *("baseline-at-chance", "baseline-incomplete", "calibration-overlap", "engine-differs", NO_BASELINE),
        *("not-answered", "stopped-early", "suite-changed", "suspicious", "too-few-items"),
    }
)


class DivergenceLimits(BaseModel):
    """Gross damage: next-token distributions against FP16's over a likelihood task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_mean: Annotated[float, Field(gt=0)] = 0.1
    """The greatest mean KL divergence, in nats a token."""
    documents: Annotated[int, Field(ge=2)] = 64
    """How many documents are compared, from the first on."""
    max_tokens: Annotated[int, Field(ge=8)] = 512
    """How many tokens of each."""
    top: Annotated[int, Field(ge=1, le=20)] = 20
    """How many of the likeliest tokens are kept a position."""


class DriftLimits(AskedTasks):
    """The `evals` section of a model's file: the questions, the engine, and the loss that is allowed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: Literal["served", "hf"] = "served"
    """`served` asks the image that ships, by vLLM; `hf` asks lm-eval's HF backend, for models that vLLM can't load."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Of each two-sided interval: at 0.95 either error is at most 2.5%."""
    looks: Annotated[int, Field(ge=1, le=20)] = 1
    """The number of growing parts in which the suite is asked; asking stops when the verdict is clear."""
    again: Annotated[int, Field(ge=0)] = 200
    """About how many items of each graded task FP16 answers twice: the noise floor."""
    divergence: DivergenceLimits | None = DivergenceLimits()
    """The ceiling for gross damage; `null` leaves it out."""
    layers: bool = True
    """Whether the error of each quantized layer is measured; both networks must fit into memory."""
    adapters: Mapping[str, AskedTasks] = {}
    """Questions and limits of adapters of `serve.adapters`, by name, in place of the model's own."""
    accept_inconclusive: Mapping[str, Annotated[str, Field(min_length=1)]] = {}
    """Causes of an inconclusive verdict that may pass, each with the reason; several causes are sorted and joined by
    `+`.
    """

    @field_validator("accept_inconclusive")
    @classmethod
    def _known_causes(cls, accepted: Mapping[str, str]) -> Mapping[str, str]:
        for cause in accepted:
            parts = cause.split("+")
            if not CAUSES.issuperset(parts) or parts != sorted(set(parts)):
                known = ", ".join(f"`{name}`" for name in sorted(CAUSES))
                raise ValueError(f"unknown cause `{cause}`: expected {known}; several are sorted and joined by `+`")
        return accepted

    @model_validator(mode="after")
    def _both_kinds(self) -> DriftLimits:
        limits = [task for task in self.tasks.values() if task.tier != "advisory"]
        if all(task.max_drop is None for task in limits) or all(task.max_increase is None for task in limits):
            raise ValueError(
                "`tasks` needs a task with `max_drop` and one with `max_increase`: neither detects all damage alone"
            )
        return self

    @model_validator(mode="after")
    def _looks_at_files(self) -> DriftLimits:
        theirs = [name for name, task in self.tasks.items() if task.data is None]
        if self.looks > 1 and theirs:
            raise ValueError(
                f"`looks` needs tasks over files of data, which are asked in parts; `{theirs[0]}` has none"
            )
        return self

    @model_validator(mode="after")
    def _tool_calls_are_served(self) -> DriftLimits:
        asking = [name for name, task in self.tasks.items() if task.asks_for_tool_calls(name)]
        if asking and self.engine != "served":
            raise ValueError(f"`{asking[0]}` asks for tool calls, which need `engine: served`")
        return self

    def with_tool_calls(self) -> DriftLimits:
        """Return the same with our own requests for tool calls, unless the model file asks for calls itself."""
        if any(task.asks_for_tool_calls(name) for name, task in self.tasks.items()) or self.engine != "served":
            return self
        return self.model_copy(update={"tasks": {**self.tasks, TOOL_CALLS: _TOOL_CALLS}})

    @property
    def image_tasks(self) -> list[str]:
        """The tasks that ask about images, by their keys in a model file; adapters' among them."""
        own = {f"evals.adapters.{name}": asked.tasks for name, asked in self.adapters.items()}
        return [
            f"{place}.tasks.{name}"
            for place, tasks in {"evals": self.tasks, **own}.items()
            for name, task in tasks.items()
            if task.shows_images(name)
        ]

    @property
    def all_tasks(self) -> tuple[TaskLimits, ...]:
        """The model's tasks, and those of adapters that have their own."""
        own = (task for asked in self.adapters.values() for task in asked.tasks.values())
        return (*self.tasks.values(), *own)

    def of_adapter(self, name: str) -> DriftLimits:
        """The questions and limits of an adapter: its own or the model's, asked at once.

        Distributions are compared over a likelihood task, so not where the adapter's own tasks have none.
        """
        own = self.adapters.get(name)
        asked = {} if own is None else {"suite": own.suite, "seed": own.seed, "tasks": own.tasks}
        tasks = self.tasks if own is None else own.tasks
        compared = self.divergence if any(task.max_increase is not None for task in tasks.values()) else None
        return self.model_copy(update={**asked, "looks": 1, "layers": False, "adapters": {}, "divergence": compared})

    @property
    def fractions(self) -> tuple[float, ...]:
        """The parts of the suite after which one looks; the last is all of it."""
        return tuple(look / self.looks for look in range(1, self.looks + 1))


# Of 48 requests an interval is wide: what they show to be lost fails, and what they cannot decide does not block.
_TOOL_CALLS = TaskLimits(
    task=TOOL_CALLS,
    data=TASKS / f"{TOOL_CALLS}.jsonl",
    kind="generated",
    size=48,
    tokens=400,
    tier="supporting",
    max_drop=0.05,
)
