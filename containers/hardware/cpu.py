"""This machine's CPU: its model, the instruction set that vLLM's CPU kernels can use, and what that means for speed."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

InstructionSet = Literal["none", "avx2", "avx512", "avx512_bf16", "amx"]
INSTRUCTION_SETS: tuple[InstructionSet, ...] = get_args(InstructionSet)

_CPUINFO = Path("/proc/cpuinfo")
_READ_BYTES = 1 << 24  # a machine of 4,096 threads has 8 MB
_MODEL_CHARACTERS = 128
# The flags of each set, as Linux names them. vLLM requires the four of AVX-512 (`torch.cpu._is_avx512_supported`) and
# loads its AVX2 build if one is absent.
_NEEDED: dict[InstructionSet, frozenset[str]] = {
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
    "avx512_bf16": frozenset({"avx512_bf16"}),
    "amx": frozenset({"amx_tile", "amx_bf16"}),
}
_MEANING: dict[InstructionSet, str] = {
    "none": "no AVX2: no CPU runtime can run here",
    "avx2": "no AVX-512: 16-bit and 4-bit layers are multiplied in float32, which is slower and takes more memory",
    "avx512": "AVX-512 without bfloat16: vLLM's own 4-bit kernels; 16-bit layers are multiplied in float32",
    "avx512_bf16": "AVX-512 with bfloat16: vLLM's own kernels at full speed",
    "amx": "AVX-512 and AMX with bfloat16: vLLM's own kernels at full speed",
}


# A Kubernetes node that matches one of these terms can run a CPU runtime. Node Feature Discovery labels nodes with
# their CPU's vendor, and with `AVX2` if they have it; nodes without its labels are allowed.
_NFD = "feature.node.kubernetes.io"
_AMD64 = {"key": "kubernetes.io/arch", "operator": "In", "values": ["amd64"]}
NODE_TERMS = (
    (_AMD64, {"key": f"{_NFD}/cpu-cpuid.AVX2", "operator": "In", "values": ["true"]}),
    (_AMD64, {"key": f"{_NFD}/cpu-model.vendor_id", "operator": "DoesNotExist"}),
)


@dataclass(frozen=True)
class Cpu:
    """A CPU; ``cores`` is the number of logical CPUs that this process may use.

    ``instruction_set`` is the best one it has; each set in `INSTRUCTION_SETS` contains those before it. ``none`` is a
    CPU without AVX2, or of another architecture than x86-64.
    """

    model: str
    architecture: str
    instruction_set: InstructionSet
    cores: int

    @property
    def bfloat16(self) -> bool:
        """Whether it has instructions that multiply bfloat16."""
        return self.instruction_set in {"avx512_bf16", "amx"}

    @property
    def meaning(self) -> str:
        """What its instruction set means for speed."""
        return _MEANING[self.instruction_set]

    @property
    def refusal(self) -> str | None:
        """Why no CPU runtime can run on it, and what to do; None if one can."""
        if self.architecture != "x86_64":
            found = f"{self.architecture} ({self.model})"
            return (
                f"the CPU runtimes are for x86-64, and this machine is {found}: release on an x86-64 machine with AVX2"
            )
        if self.instruction_set == "none":
            return (
                f"{self.model} has no AVX2, which the CPU runtimes need: use a newer x86-64 machine, or a GPU runtime"
            )
        return None


def this_cpu(at_most: InstructionSet | None = None) -> Cpu:
    """Read this machine's CPU; ``at_most`` (``SLIPWAY_CPU_ISA``) limits its instruction set."""
    try:
        with _CPUINFO.open("rb") as file:
            text = file.read(_READ_BYTES).decode(errors="replace")
    except OSError:
        text = ""
    return describe(text, platform.machine(), len(os.sched_getaffinity(0)), at_most)


def describe(text: str, architecture: str, cores: int, at_most: InstructionSet | None = None) -> Cpu:
    """Read a CPU from the text of ``/proc/cpuinfo``; a flag counts only if every processor has it."""
    fields = [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in text.splitlines())]
    flags = [frozenset(value.split()) for key, value in fields if key == "flags"]
    common = frozenset.intersection(*flags) if flags else frozenset()
    names = [value for key, value in fields if key in {"model name", "Model", "Processor"} and value]
    found: InstructionSet = "none"
    for name, needed in _NEEDED.items() if architecture == "x86_64" else ():
        if not needed <= common:
            break
        found = name
    if at_most is not None:
        found = min(found, at_most, key=INSTRUCTION_SETS.index)
    model = "".join(character for character in (names or ["unknown"])[0] if character.isprintable())
    return Cpu(model[:_MODEL_CHARACTERS], architecture, found, cores)
