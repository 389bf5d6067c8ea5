"""Measuring each layer's error in a worker, in the environment that asks questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.drift.pairs import Layer

ENVIRONMENT = "lm-eval"
WORKER = Path(__file__).with_name("layers.py")

RunWorker = Callable[[str, Path, Mapping[str, Any], Path], dict[str, Any]]


def measure_layers(
    source: Path,
    checkpoint: Path,
    texts: Sequence[str],
    *,
    max_tokens: int,
    run_worker: RunWorker,
    scratch: Path,
) -> list[Layer]:
    """Return each quantized layer's relative output error on texts, in the network's order (`evals.drift.layers`)."""
    request = {"source": source, "checkpoint": checkpoint, "texts": list(texts), "max_tokens": max_tokens}
    found = run_worker(ENVIRONMENT, WORKER, request, scratch)
    return [Layer.model_validate(layer) for layer in found["layers"]]
