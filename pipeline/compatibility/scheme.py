"""A scheme of a model file: the format, the program that writes it, and its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.compatibility.backends import BITS, GROUP_SIZES, WITHOUT_MODEL

if TYPE_CHECKING:
    from containers.hardware.cpu import InstructionSet

Method = Literal["awq", "gptq", "fp8", "fp8-block", "w8a8", "w4a16", "nvfp4", "mxfp4"]
BackendName = Literal["autoawq", "gptqmodel", "autogptq", "llmcompressor"]

GPTQ_ONLY = ("symmetric", "desc_act")
# What a method prescribes, or uses if the scheme doesn't say: bits and group size.
_SIZES: Mapping[str, tuple[int, int]] = {
    "awq": (4, 128),
    "gptq": (4, 128),
    "fp8": (8, -1),
    "fp8-block": (8, 128),
    "w8a8": (8, -1),
    "w4a16": (4, 128),
    "nvfp4": (4, 16),
    "mxfp4": (4, 32),
}
# What vLLM quantizes of a layer's inputs while it runs.
_INPUTS: Mapping[str, str] = {
    "fp8": "inputs in FP8, a scale for each token",
    "fp8-block": "inputs in FP8, a scale for each 128",
    "w8a8": "inputs in INT8, a scale for each token",
    "nvfp4": "inputs in FP4, a scale for each 16",
    "mxfp4": "inputs in FP4, a scale for each 32",
}
# The bits of GPTQ that vLLM 0.32 loads on any device (`auto_gptq.py`, `gptq_utils.py`).
_SERVED_BITS = (4, 8)


class Scheme(BaseModel):
    """How a model is quantized."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method
    """The format of the quantized weights."""
    backend: BackendName
    """The program that quantizes; AWQ by `autoawq` or `gptqmodel`, GPTQ by `gptqmodel` or `autogptq`, all others by
    `llmcompressor`.
    """
    bits: int = 4
    """Bits per weight: AWQ 4; GPTQ 2, 3, 4 or 8; otherwise what the method's name says."""
    group_size: int = 128
    """How many input weights share a scale: AWQ and `w4a16` 32, 64 or 128; GPTQ 16 to 256, or -1 for a whole row;
    otherwise fixed by the method (`fp8` and `w8a8` -1, `fp8-block` 128, `nvfp4` 16, `mxfp4` 32).
    """
    symmetric: bool = True
    """GPTQ only: no zero points."""
    desc_act: bool = False
    """GPTQ only: quantize columns in order of activation."""
    clone_saved_weights: bool = Field(default=True, exclude_if=lambda value: value is True)
    """AutoAWQ only: `false` switches off a fix that it needs on a CPU. The checkpoint is then damaged, for tests of the
    gates.
    """
    kv_cache: Literal["fp8"] | None = Field(default=None, exclude_if=lambda value: value is None)
    """`llmcompressor` only: `fp8` calibrates scales for keys and values, and `serve.kv_cache` is then `fp8` too."""

    @model_validator(mode="before")
    @classmethod
    def _sized(cls, given: Any) -> Any:  # noqa: ANN401 - whatever the file says; pydantic validates it afterwards
        if not isinstance(given, Mapping) or not isinstance(given.get("method"), str):
            return given
        bits, group_size = _SIZES.get(given["method"], (4, 128))
        return {"bits": bits, "group_size": group_size, **given}

    @model_validator(mode="after")
    def _supported(self) -> Scheme:
        bits = BITS.get((self.method, self.backend))
        if bits is None:
            able = sorted(backend for method, backend in BITS if method == self.method)
            raise ValueError(f"backend `{self.backend}` can't write {self.method}: use {either(able)}")
        if self.bits not in bits:
            raise ValueError(f"`{self.backend}` writes {self.method} with {either(bits)} `bits`, not {self.bits}")
        if self.group_size not in GROUP_SIZES[self.method]:
            sizes = either(GROUP_SIZES[self.method])
            raise ValueError(f"{self.method} supports a `group_size` of {sizes}, not {self.group_size}")
        if self.method != "gptq" and (extra := [key for key in GPTQ_ONLY if key in self.model_fields_set]):
            raise ValueError(f"`{extra[0]}` applies only to gptq: remove it, or use `method: gptq`")
        if self.backend != "llmcompressor" and self.kv_cache is not None:
            raise ValueError("`kv_cache` applies only to the backend `llmcompressor`: remove it")
        if self.backend != "autoawq" and "clone_saved_weights" in self.model_fields_set:
            raise ValueError("`clone_saved_weights` applies only to the backend `autoawq`: remove it")
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether the backend needs text."""
        return self.method not in WITHOUT_MODEL or self.kv_cache is not None

    @property
    def not_served(self) -> str | None:
        """The key whose value vLLM refuses on every device, or None if vLLM serves the scheme."""
        if self.method != "gptq":
            return None
        if self.bits not in _SERVED_BITS:
            return "bits"
        if not self.symmetric:
            return "symmetric"
        # With one group for a whole row, the order of columns makes no difference.
        return "desc_act" if self.desc_act and self.group_size > 0 else None

    def unsupported(self, instruction_set: InstructionSet) -> str | None:
        """Say why vLLM can't serve the scheme on such a CPU; None if it can. Read in its `kernels/linear`, 0.32."""
        if self.method in {"nvfp4", "mxfp4"}:
            return f"vLLM has no kernel for `method: {self.method}` on CPUs"
        if self.method == "fp8-block" and instruction_set != "amx":
            return f"vLLM's kernel for `method: fp8-block` on CPUs needs AMX, and this one has {instruction_set}"
        return None

    @property
    def quantized_at_run_time(self) -> tuple[str, ...]:
        """What vLLM quantizes beside the stored weights, in words; an engine that only unpacks weights does not."""
        inputs = [_INPUTS[self.method]] if self.method in _INPUTS else []
        return (*inputs, *(["keys and values in FP8"] if self.kv_cache else []))


def either(choices: Sequence[object]) -> str:
    """``4``; ``2, 3 or 4``; words in backticks."""
    words = [f"`{choice}`" if isinstance(choice, str) else str(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
