"""A gate's verdict: never a bare boolean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator

Status = Literal["pass", "fail", "inconclusive"]


class Verdict(BaseModel):
    """What a gate concluded from its evidence, and why.

    ``metrics`` and ``limits`` hold what was compared, unrounded; a metric that could not be had is absent,
    never zero. ``cause`` names why a verdict is inconclusive (``database-absent``); ``accepted_because`` holds
    the words with which the model's file lets that cause through.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gate: str
    """The gate's name."""
    status: Status
    """`inconclusive` where the evidence decides nothing."""
    reason: str
    """In words, with the figures that decided."""
    cause: str | None = None
    """Why it is inconclusive, as the model file names it."""
    metrics: Mapping[str, float] = {}
    """What was measured, unrounded; what could not be measured is absent."""
    limits: Mapping[str, float] = {}
    """What it was compared with."""
    accepted_because: str | None = None
    """The reason with which the model file accepts the cause."""

    @field_validator("metrics", "limits")
    @classmethod
    def _finite(cls, values: Mapping[str, float]) -> Mapping[str, float]:
        """NaN and infinity have no place in canonical JSON, nor in a comparison."""
        for name, value in values.items():
            if not math.isfinite(value):
                msg = f"`{name}` is {value}: leave out a metric that could not be measured"
                raise ValueError(msg)
        return values

    @property
    def blocks(self) -> bool:
        """Whether the release stops here: the gate failed, or is inconclusive and its cause is not accepted."""
        return self.status == "fail" or (self.status == "inconclusive" and self.accepted_because is None)

    def accepting(self, causes: Mapping[str, str]) -> Verdict:
        """Return the verdict with ``accepted_because`` set where ``causes`` (cause → reason) covers it."""
        if self.status != "inconclusive" or self.cause is None or self.cause not in causes:
            return self
        return self.model_copy(update={"accepted_because": causes[self.cause]})
