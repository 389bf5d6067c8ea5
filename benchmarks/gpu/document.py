"""What a GPU run writes: one JSON document, of which the docs quote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.quantization.quantize import QuantizationRecord


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Machine(_Part):
    """The machine, as torch and NVML each describe it."""

    kind: Literal["machine"] = "machine"
    python: str
    cpus: int
    torch: str
    torch_cuda: str | None
    """The CUDA version that torch was built for."""
    torch_device: str | None
    torch_capability: tuple[int, int] | None
    nvml_device: str | None
    nvml_capability: tuple[int, int] | None
    driver: str | None
    driver_cuda: tuple[int, int] | None
    memory_bytes: int | None
    known_as: str | None
    """The GPU's name in `containers/hardware/gpus.yaml`."""


class Requirement(_Part):
    """What the gate answered to one image's requirements."""

    image: str
    """A runtime, or what was made up."""
    expected: Literal["accepted", "refused"] | None
    """None where it depends on the machine."""
    problems: tuple[str, ...]
    """Why the image is refused; empty if it is accepted."""


class Gate(_Part):
    """The driver and capability gate on this machine's driver."""

    kind: Literal["gate"] = "gate"
    requirements: tuple[Requirement, ...]
    second_reservation: str | None
    """What the pool said to a process that asked for the GPU while it was reserved; None if it got it."""


class Memory(_Part):
    """NVML sampling while another process holds a known amount of memory."""

    kind: Literal["memory"] = "memory"
    held_bytes: int
    """What that process allocated."""
    peaks: Mapping[str, int]
    """The GPU's memory in use, its highest value in each phase, in bytes."""
    process_bytes: int | None
    """The most that the driver attributed to the process; None if it does not report it."""
    samples_per_s: float | None
    busy: Mapping[str, bool]
    """Whether the GPU counted as used by another program, by phase."""


class Quantized(_Part):
    """A checkpoint by one backend, which passed the check of its format."""

    kind: Literal["quantized"] = "quantized"
    record: QuantizationRecord
    sha256: str
    """Of its weights' file."""
    same_as_before: bool | None = None
    """Whether an earlier run of this machine gave the same bytes; None for the first."""


class Kernel(_Part):
    """A GPU kernel (on CPU: an operator) by its time in one forward pass."""

    name: str
    calls: int
    microseconds: float


class Inference(_Part):
    """A checkpoint loaded by its own library."""

    kind: Literal["inference"] = "inference"
    device: Literal["cpu", "cuda"]
    layers: Mapping[str, int]
    """Quantized layers by the class that computes them."""
    kernels: tuple[Kernel, ...]
    """The ones that took most time."""
    loss: float
    """Nats a token on held-out text."""
    unpacked_loss: float
    """The same of plain linear layers that hold the weights as Slipway unpacks them, in float32 on CPU."""


Found = Annotated[Machine | Gate | Memory | Quantized | Inference, Field(discriminator="kind")]


class Part(_Part):
    """One part of the run."""

    part: str
    status: Literal["ok", "failed", "skipped"]
    seconds: float
    reason: str | None = None
    """Why it failed or was left out."""
    found: Found | None = None


class GpuRun(_Part):
    """A run, complete or cut off: it is written anew after each part."""

    started: str
    dry_run: bool
    seconds: float
    carried_bytes: int
    """All carried wheels together."""
    parts: tuple[Part, ...] = ()
