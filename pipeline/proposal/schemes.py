"""Which schemes suit a device and can be made of a model; of the others, why not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from containers.hardware.cpu import InstructionSet
from containers.hardware.gpu_models import GpuModel
from pipeline.compatibility import preflight
from pipeline.compatibility.backends import GROUP_SIZES, METHODS
from pipeline.compatibility.description import ModelDescription, has_experts
from pipeline.compatibility.scheme import Scheme
from pipeline.errors import UnsupportedModelError

MEANINGS: Mapping[str, str] = {
    "awq": "4-bit weights, scaled by what the calibration text activates",
    "gptq": "4-bit weights, each rounding error corrected in the columns after it",
    "fp8": "FP8 weights and activations, from the weights alone",
    "w8a8": "INT8 weights and activations",
    "w4a16": "4-bit weights in groups, activations at 16 bits",
    "nvfp4": "4-bit floats, which Blackwell's FP4 units multiply",
    "mxfp4": "4-bit floats with a scale for 32, from the weights alone",
}
_AMPERE = (8, 0)
# By the GPU's compute capability, the newest first: schemes to make, each of the first method that the model allows.
# FP8 units came with capability 8.9, INT8 ones that vLLM's kernels use with 8.0, FP4 ones with 10.0.
_BY_CAPABILITY: Sequence[tuple[tuple[int, int], Sequence[Sequence[str]]]] = (
    ((10, 0), (("fp8",), ("nvfp4", "w4a16", "gptq", "awq"))),
    ((8, 9), (("fp8",), ("w4a16", "gptq", "awq"))),
    (_AMPERE, (("w8a8",), ("w4a16", "gptq", "awq"))),
    ((0, 0), (("awq",), ("gptq",))),
)
_ON_CPU: Sequence[Sequence[str]] = (("awq",), ("gptq",))
# Where none of those can be made: vLLM serves them on CPUs, and on GPUs from Ampere on.
_LAST = ("w4a16", "w8a8", "fp8", "mxfp4")
# The largest that fits is the smallest checkpoint.
_GROUPS = (128, 64, 32, 16)
# The end of a refusal, which proposes other schemes: here they are tried.
_PROPOSED = re.compile(r": (?:use|choose|no backend) [^;]*$")


@dataclass(frozen=True)
class Choice:
    """Schemes by name, and why other methods were left out."""

    schemes: Mapping[str, Scheme]
    left_out: Mapping[str, str]


def choose(model: ModelDescription, gpu: GpuModel | None, instruction_set: InstructionSet) -> Choice:
    """Choose schemes for a GPU, or for a CPU with this instruction set.

    Raises:
        UnsupportedModelError: none can be made of the model; says why.
    """
    slots = _ON_CPU if gpu is None else next(found for least, found in _BY_CAPABILITY if gpu.capability >= least)
    schemes: dict[str, Scheme] = {}
    left_out: dict[str, str] = {}
    last = () if gpu is not None and gpu.capability < _AMPERE else _LAST
    for methods in (*slots, last):
        if methods is last and schemes:
            break
        for method in methods:
            if method in left_out or method in schemes:
                continue
            found = _best(model, method, None if gpu is not None else instruction_set)
            if isinstance(found, Scheme):
                schemes[method] = found
                break
            left_out[method] = found
    if not schemes:
        reasons = "; ".join(dict.fromkeys(left_out.values()))
        raise UnsupportedModelError(f"no scheme can be made of this model: {reasons}")
    return Choice(schemes, left_out)


def _best(model: ModelDescription, method: str, instruction_set: InstructionSet | None) -> Scheme | str:
    """The first backend and the largest group that the model allows; or the first reason why there is none.

    ``instruction_set`` is the CPU's that serves, None for a GPU.
    """
    reason = None
    for scheme in _all_of(method):
        problems = preflight.find_problems(model, scheme, has_gpus=instruction_set is None)
        if not problems and instruction_set is not None:
            unserved = scheme.unsupported(instruction_set, experts=has_experts(model.config))
            problems = [] if unserved is None else [unserved]
        if not problems:
            return scheme
        reason = reason or _PROPOSED.sub("", problems[0])
    return reason or "no backend writes it"


def _all_of(method: str) -> Iterator[Scheme]:
    fixed = len(GROUP_SIZES[method]) == 1
    for backend in METHODS[method]:
        for size in GROUP_SIZES[method] if fixed else (size for size in _GROUPS if size in GROUP_SIZES[method]):
            yield Scheme.model_validate({"method": method, "backend": backend, "group_size": size})
