"""``mixture.json``: which layers a mixture keeps in which format, and what that was predicted and measured to lose.

Losses are divergences of next-token distributions from the source's, in nats a token, on calibration text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError

from evals.errors import AnswersError
from registry.errors import first_problem

FILE = "mixture.json"
UNQUANTIZED = "16 bits"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FormatCost(_Frozen):
    """What a group of layers takes and is predicted to lose in one format."""

    bytes: NonNegativeInt
    loss: NonNegativeFloat


class MixedGroup(_Frozen):
    """Layers that the engine fuses, and that share a format therefore."""

    layers: tuple[str, ...]
    weights: PositiveInt
    """How many weights they have."""
    chosen: str
    """The format that they were given; a key of ``formats``."""
    formats: Mapping[str, FormatCost]
    """What each format would have cost, weights rounded to the nearest."""
    measured: float
    """What the finished layers lose, all others at the source's weights."""


class Mixture(_Frozen):
    """The evidence of a mixture of formats."""

    budget_bytes: PositiveInt
    """What the groups' layers may take together."""
    bytes: PositiveInt
    predicted: NonNegativeFloat
    """The sum of the chosen formats' losses; no assignment that fits has less."""
    greedy: NonNegativeFloat
    """The same of the assignment that a greedy choice gives."""
    measured: float
    """What the finished checkpoint loses."""
    groups: Mapping[str, MixedGroup]
    """By name, in the network's order."""

    def format(self) -> str:
        """The document as JSON."""
        return self.model_dump_json(indent=1)


def read_mixture(path: Path) -> Mixture:
    """Read the evidence of a mixture.

    Raises:
        AnswersError: it can't be read or is not valid.
    """
    try:
        return Mixture.model_validate_json(path.read_bytes())
    except OSError as error:
        raise AnswersError(f"can't read {path}: {error}") from error
    except ValidationError as error:
        raise AnswersError(f"{path} is not valid: {first_problem(error)}") from error
