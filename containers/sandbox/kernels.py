"""What computed a server's answers: its CPU or GPU, its cores, and the kernels that its engine reports.

The runtime's plugin writes one line into the engine's log: ``slipway kernels: `` and a JSON object. The log is not
trusted: at most `_LOG_BYTES` of it are read, and an invalid line counts as absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

MARK = b"slipway kernels: "
_LOG_BYTES = 4 << 20
_LINE_BYTES = 16 << 10

Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:+-]{1,128}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[ -~]{1,128}$")]


class Kernels(BaseModel):
    """An engine's kernels: of 16-bit layers, of quantized layers with their numbers of layers, and of attention.

    ``compute_dtype`` is the type of activations between layers, ``threads`` the number of compute threads.
    `containers/runtimes` defines the possible names.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    instruction_set: Word
    """The best instruction set that kernels could use."""
    cpu_model: Name
    """The CPU's model."""
    linear_16bit: Word
    """The implementation of 16-bit linear layers."""
    linear_quantized: Annotated[Mapping[Word, Annotated[int, Field(ge=0)]], Field(max_length=32)]
    """Number of quantized layers by kernel."""
    compute_dtype: Word
    """The type of activations between layers."""
    threads: Annotated[int, Field(ge=0)]
    """Number of compute threads."""
    kv_cache_dtype: Word
    """The type of the KV cache."""
    attention: Word
    """The implementation of attention."""


class ComputedOn(BaseModel):
    """What computed a server's answers, as far as known: ``gpus`` by UUID, ``cores`` by the numbers of logical CPUs.

    ``cores_shared`` is whether another server used some of them at the same time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpus: tuple[str, ...] = ()
    """UUIDs of the GPUs."""
    cpu_model: str | None = None
    """The CPU's model."""
    instruction_set: str | None = None
    """The CPU's best instruction set that could be used."""
    cores: tuple[int, ...] | None = None
    """Numbers of the logical CPUs."""
    cores_shared: bool = False
    """Whether another server used some of these cores at the same time."""
    kernels: Kernels | None = None
    """The engine's kernels, as it logged them."""

    @model_validator(mode="before")
    @classmethod
    def _one_gpu(cls, given: Any) -> Any:  # noqa: ANN401 - what the file holds, not yet checked
        return with_gpus(given)

    def __str__(self) -> str:
        """Describe it for a report."""
        parts = [part for part in (*self.gpus, self.cpu_model, self.instruction_set) if part]
        if self.cores is not None:
            shared = " shared with other servers" if self.cores_shared else ""
            parts.append(f"{len(self.cores)} cores ({', '.join(map(str, self.cores))}){shared}")
        if self.kernels is not None:
            packed = [f"{name} for {layers} layers" for name, layers in sorted(self.kernels.linear_quantized.items())]
            parts += [
                f"{self.kernels.threads} threads", f"{self.kernels.compute_dtype} between layers",
                f"16-bit layers by {self.kernels.linear_16bit}", *packed, f"attention {self.kernels.attention}",
                f"KV cache {self.kernels.kv_cache_dtype}",
            ]  # fmt: skip
        return ", ".join(parts) or "unknown"


def with_gpus(given: Any) -> Any:  # noqa: ANN401 - what a file holds, not yet checked
    """Return what a file says of a server with ``gpus`` in place of ``gpu``, from before there could be several."""
    if not isinstance(given, Mapping) or "gpu" not in given:
        return given
    rest = {key: value for key, value in given.items() if key != "gpu"}
    return {"gpus": [given["gpu"]] if given["gpu"] else [], **rest}


def head(log: Iterable[bytes]) -> bytes:
    """Return the beginning of an engine's log: what it says before it answers is there."""
    held = b""
    for chunk in log:
        held += chunk[: _LOG_BYTES - len(held)]
        if len(held) >= _LOG_BYTES:
            break
    return held


def find(log: bytes) -> Kernels | None:
    """Return the kernels from the first valid line of an engine's log; None without such a line."""
    for line in log.splitlines():
        _, mark, told = line.partition(MARK)
        if mark and len(told) <= _LINE_BYTES:
            try:
                return Kernels.model_validate_json(told)
            except ValidationError:
                continue
    return None
