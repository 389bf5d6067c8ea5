"""A prediction of a server's memory, and its error against the measured peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from pydantic import BaseModel, ConfigDict

from evals.load.slo import shown

# A prediction that is off by more than this share is a finding.
TOLERANCE = 0.15
# What the runtime takes beside weights and KV cache: interpreter, libraries, buffers. Measured on the demo's images
# (4.2M parameters, whose weights are negligible) with Python 3.11 and torch 2.13, the two processes of vLLM 0.32.
RUNTIME_BYTES: Mapping[str, int] = {"vllm-cpu": 1_350_000_000}
# What each rank's process takes besides if there are several: with one, the engine's own process computes. Measured
# with two ranks: 1.83 and 1.94 GB in all.
RANK_BYTES = 300_000_000


@dataclass(frozen=True)
class ExpectedMemory:
    """The parts of a server's memory at its peak, in bytes."""

    weights_bytes: int
    kv_cache_bytes: int
    runtime_bytes: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.weights_bytes + self.kv_cache_bytes + self.runtime_bytes


def expect(weights_bytes: int, runtime: str, environment: Mapping[str, str], ranks: int = 1) -> ExpectedMemory | None:
    """Predict the memory of a server with so many ranks; None for a runtime that was not measured yet.

    On CPU each rank takes ``VLLM_CPU_KVCACHE_SPACE`` GiB for its KV cache and touches all of it at the start. The ranks
    divide the weights among them.
    """
    space = environment.get("VLLM_CPU_KVCACHE_SPACE")
    if runtime not in RUNTIME_BYTES or space is None:
        return None
    runtime_bytes = RUNTIME_BYTES[runtime] + (ranks * RANK_BYTES if ranks > 1 else 0)
    return ExpectedMemory(weights_bytes, ranks * int(float(space) * 2**30), runtime_bytes)


class MemoryPrediction(BaseModel):
    """A prediction beside the measured peak: ``error`` is relative to the peak, None where that was not measured."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    weights_bytes: int
    """Predicted memory of the weights."""
    kv_cache_bytes: int
    """Predicted memory of the KV cache."""
    runtime_bytes: int
    """Predicted memory of the runtime."""
    total_bytes: int
    """Predicted memory in all."""
    error: float | None
    """The prediction's error relative to the measured peak; none if the peak was not measured."""
    off: bool
    """Whether the error is too large."""
    sentence: str
    """Prediction and measurement as text."""


def compared(expected: ExpectedMemory, peaks: Mapping[str, int | None]) -> MemoryPrediction:
    """Compare the prediction with the measured peak."""
    measured = peaks.get("memory_bytes")
    error = None if not measured else expected.total / measured - 1
    sentence = "the peak of the memory was not measured"
    if measured and error is not None:
        predicted, found = shown("bytes", expected.total), shown("bytes", measured)
        sentence = f"predicted memory {predicted}, measured {found}: {error:+.0%}"
    return MemoryPrediction(
        **asdict(expected),
        total_bytes=expected.total,
        error=error,
        off=error is not None and abs(error) > TOLERANCE,
        sentence=sentence,
    )
