"""The `evals` section of a model's file: what is asked, of which engine, and the loss that is let through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from evals.drift.suite import AskedTasks

# Why a drift verdict can be inconclusive; `evals.drift.drift_gate.judge` says when.
CAUSES = frozenset(
    {
        *("baseline-at-chance", "baseline-incomplete", "calibration-overlap", "engine-differs", "not-answered"),
        *("stopped-early", "suite-changed", "suspicious", "too-few-items"),
    }
)


class DivergenceLimits(BaseModel):
    """Gross damage: next-token distributions against FP16's over the first ``documents`` of a likelihood task.

    ``max_mean`` is in nats a token, at most; the ``top`` likeliest tokens are kept a position.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_mean: Annotated[float, Field(gt=0)] = 0.1
    documents: Annotated[int, Field(ge=2)] = 64
    max_tokens: Annotated[int, Field(ge=8)] = 512
    top: Annotated[int, Field(ge=1, le=20)] = 20


class DriftLimits(AskedTasks):
    """The `evals` section of a model's file: what is asked, of which engine, and the loss that is let through.

    ``engine`` is ``served`` (the image that ships, by vLLM) or ``hf`` (lm-eval's HF backend, for what vLLM can't load).
    ``looks`` asks the suite in so many growing parts and stops when the verdict is clear. ``again`` items a task are
    asked of FP16 twice. ``layers`` measures each quantized layer, for which both networks must fit into memory.
    ``accept_inconclusive`` maps a cause, or several joined by ``+`` and sorted (`judge`), to why it may pass.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: Literal["served", "hf"] = "served"
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    looks: Annotated[int, Field(ge=1, le=20)] = 1
    again: Annotated[int, Field(ge=0)] = 200
    divergence: DivergenceLimits | None = DivergenceLimits()
    layers: bool = True
    accept_inconclusive: Mapping[str, Annotated[str, Field(min_length=1)]] = {}

    @field_validator("accept_inconclusive")
    @classmethod
    def _known_causes(cls, accepted: Mapping[str, str]) -> Mapping[str, str]:
        for cause in accepted:
            parts = cause.split("+")
            if not CAUSES.issuperset(parts) or parts != sorted(set(parts)):
                known = ", ".join(f"`{name}`" for name in sorted(CAUSES))
                raise ValueError(f"there is no cause `{cause}`: there are {known}; several are sorted, joined by `+`")
        return accepted

    @model_validator(mode="after")
    def _both_kinds(self) -> DriftLimits:
        limits = [task for task in self.tasks.values() if task.tier != "advisory"]
        if all(task.max_drop is None for task in limits) or all(task.max_increase is None for task in limits):
            raise ValueError(
                "`tasks` needs a task with `max_drop` and one with `max_increase`: neither sees all damage"
            )
        return self

    @model_validator(mode="after")
    def _looks_at_files(self) -> DriftLimits:
        theirs = [name for name, task in self.tasks.items() if task.data is None]
        if self.looks > 1 and theirs:
            raise ValueError(f"`looks` asks in parts, which only tasks over files of data are: not `{theirs[0]}`")
        return self

    @property
    def fractions(self) -> tuple[float, ...]:
        """The parts of the suite after which one looks; the last is all of it."""
        return tuple(look / self.looks for look in range(1, self.looks + 1))
