"""Measure each layer's error in a worker, in the environment that asks questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from pydantic import BaseModel, ConfigDict, ValidationError

from evals.drift.pairs import Layer
from evals.errors import AnswersError
from evals.workers import RunWorker
from registry.errors import first_problem

ENVIRONMENT = "lm-eval"
WORKER = Path(__file__).with_name("layers.py")


class LayersRequest(TypedDict):
    """The request to the worker `evals.drift.layers`."""

    source: Path | str
    checkpoint: Path | str
    samples: tuple[str | list[dict[str, str]], ...]
    """Each a text, or the messages of a conversation."""
    max_tokens: int
    chat_template: str | None
    """In place of the model's own."""


class LayersResult(BaseModel):
    """The result of the worker `evals.drift.layers`."""

    model_config = ConfigDict(frozen=True)

    layers: tuple[Layer, ...]


def measure_layers(
    source: Path,
    checkpoint: Path,
    samples: Sequence[str | list[dict[str, str]]],
    *,
    max_tokens: int,
    run_worker: RunWorker,
    scratch: Path,
    chat_template: Path | None = None,
) -> list[Layer]:
    """Return each quantized layer's relative output error on samples, in the network's order (`evals.drift.layers`).

    Raises:
        AnswersError: the worker's result does not have the expected form.
    """
    request = LayersRequest(
        source=source,
        checkpoint=checkpoint,
        samples=tuple(samples),
        max_tokens=max_tokens,
        chat_template=None if chat_template is None else chat_template.read_text(encoding="utf-8"),
    )
    found = run_worker(ENVIRONMENT, WORKER, request, scratch)
    try:
        return list(LayersResult.model_validate(found).layers)
    except ValidationError as error:
        raise AnswersError(f"the result of the layers' worker is not valid: {first_problem(error)}") from error
