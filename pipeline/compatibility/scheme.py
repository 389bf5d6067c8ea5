"""A scheme of a model file: the format, the program that writes it, and its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ByteSize, ConfigDict, Field, model_validator

from pipeline.compatibility.backends import BITS, GROUP_SIZES, WITHOUT_MODEL

if TYPE_CHECKING:
    from containers.hardware.cpu import InstructionSet

Method = Literal["awq", "gptq", "fp8", "fp8-block", "w8a8", "w4a16", "nvfp4", "mxfp4", "mixed", "as-is"]
AS_IS: Method = "as-is"
# Of checkpoints that were quantized elsewhere, and that no backend here writes.
PublishedFormat = Literal["fp8-scale-inv", "mxfp4-experts"]
Format = Method | PublishedFormat
MixedFormat = Literal["w4a16", "w8a8", "fp8"]
BackendName = Literal["autoawq", "gptqmodel", "autogptq", "llmcompressor", "none"]

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
    "mixed": (4, -1),
}
# What vLLM serves together, on GPUs and on CPUs; layers at 16 bits are always allowed.
_MIXED_FORMATS: tuple[MixedFormat, ...] = ("w4a16", "w8a8", "fp8")
# vLLM 0.32, `fused_moe/experts/cpu_moe.py`.
_EXPERTS_BY_AMX = frozenset({"awq", "gptq", "w4a16", "w8a8", "fp8-block", "fp8-scale-inv"})
# What vLLM quantizes of a layer's inputs while it runs.
_INPUTS: Mapping[str, str] = {
    "fp8": "inputs in FP8, a scale for each token",
    "fp8-block": "inputs in FP8, a scale for each 128",
    "fp8-scale-inv": "inputs in FP8, a scale for each 128",
    "w8a8": "inputs in INT8, a scale for each token",
    "nvfp4": "inputs in FP4, a scale for each 16",
    "mxfp4": "inputs in FP4, a scale for each 32",
}
# Keys of a scheme that quantizes.
_CHOSEN = frozenset({"bits", "group_size", *GPTQ_ONLY, "clone_saved_weights", "kv_cache", "budget", "formats"})
# The bits of GPTQ that vLLM 0.32 loads on any device (`auto_gptq.py`, `gptq_utils.py`).
_SERVED_BITS = (4, 8)


class Budget(BaseModel):
    """How large a mixture may be: by its ``bytes`` or by its ``bits_per_weight``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: ByteSize | None = Field(default=None, gt=0, exclude_if=lambda value: value is None)
    """Bytes of all the checkpoint's tensors, as `40GiB`: embeddings, head and norms among them."""
    bits_per_weight: float | None = Field(default=None, gt=0, le=16, exclude_if=lambda value: value is None)
    """Bits that a weight of the decoder's linear layers takes on average, its share of scales among them."""

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if (self.bytes is None) == (self.bits_per_weight is None):
            raise ValueError("expected one key, `bytes` or `bits_per_weight`")
        return self

    def __str__(self) -> str:
        """``5 bits a weight``; ``40.0GiB``."""
        return f"{self.bits_per_weight:g} bits a weight" if self.bytes is None else self.bytes.human_readable()


class Scheme(BaseModel):
    """How a model is quantized."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method
    """The format of the quantized weights; `as-is` takes a source that is quantized already, in the format that its
    config.json names.
    """
    backend: BackendName = "none"
    """The program that quantizes; AWQ by `autoawq` or `gptqmodel`, GPTQ by `gptqmodel` or `autogptq`, all others by
    `llmcompressor`. Only `as-is` has none.
    """
    bits: int = 4
    """Bits per weight: AWQ 4; GPTQ 2, 3, 4 or 8; otherwise what the method's name says."""
    group_size: int = 128
    """How many input weights share a scale: AWQ and `w4a16` 32, 64 or 128; GPTQ 16 to 256, or -1 for a whole row;
    otherwise fixed by the method (`fp8`, `w8a8` and `mixed` -1, `fp8-block` 128, `nvfp4` 16, `mxfp4` 32).
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
    budget: Budget | None = Field(default=None, exclude_if=lambda value: value is None)
    """`mixed` only, and required there: how large the checkpoint may be, as `{bytes: 40GiB}` or `{bits_per_weight: 5}`.
    """
    formats: tuple[MixedFormat, ...] = Field(default=(), exclude_if=lambda value: not value)
    """`mixed` only: the formats to choose from for each layer, beside 16 bits; all three if not given. `w4a16` comes in
    groups of 32, 64 and 128.
    """

    @model_validator(mode="before")
    @classmethod
    def _sized(cls, given: Any) -> Any:  # noqa: ANN401 - whatever the file says; pydantic validates it afterwards
        if not isinstance(given, Mapping) or not isinstance(given.get("method"), str):
            return given
        if given["method"] == AS_IS:
            return given
        bits, group_size = _SIZES.get(given["method"], (4, 128))
        formats = {"formats": _MIXED_FORMATS} if given["method"] == "mixed" else {}
        return {"bits": bits, "group_size": group_size, **formats, **given}

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.method == AS_IS:
            return self._unchanged()
        bits = BITS.get((self.method, self.backend))
        if bits is None:
            able = sorted(backend for method, backend in BITS if method == self.method)
            wrong = "`backend` is missing" if self.backend == "none" else f"`{self.backend}` can't write {self.method}"
            raise ValueError(f"{wrong}: use {either(able)}")
        if self.bits not in bits:
            raise ValueError(f"`{self.backend}` writes {self.method} with {either(bits)} `bits`, not {self.bits}")
        if self.group_size not in GROUP_SIZES[self.method]:
            sizes = either(GROUP_SIZES[self.method])
            raise ValueError(f"{self.method} supports a `group_size` of {sizes}, not {self.group_size}")
        if self.method != "gptq" and (extra := [key for key in GPTQ_ONLY if key in self.model_fields_set]):
            raise ValueError(f"`{extra[0]}` applies only to gptq: remove it, or use `method: gptq`")
        if self.backend != "llmcompressor" and self.kv_cache is not None:
            raise ValueError("`kv_cache` applies only to the backend `llmcompressor`: remove it")
        if (self.method == "mixed") != (self.budget is not None):
            raise ValueError(
                "`budget` is missing: a mixture needs one, as `budget: {bits_per_weight: 5}`"
                if self.budget is None
                else "`budget` applies only to mixed: remove it, or use `method: mixed`"
            )
        if self.method != "mixed" and self.formats:
            raise ValueError("`formats` applies only to mixed: remove it, or use `method: mixed`")
        if self.method == "mixed" and (not self.formats or self.kv_cache is not None):
            raise ValueError("`mixed` needs at least one of `formats`, and calibrates no `kv_cache`")
        if self.backend != "autoawq" and "clone_saved_weights" in self.model_fields_set:
            raise ValueError("`clone_saved_weights` applies only to the backend `autoawq`: remove it")
        return self

    def _unchanged(self) -> Self:
        """A scheme that takes what it finds has nothing to choose."""
        if self.backend != "none" or (extra := self.model_fields_set & _CHOSEN):
            key = "backend" if self.backend != "none" else min(extra)
            raise ValueError(
                f"`{key}` does not apply to as-is, which takes what the source's config.json says: remove it"
            )
        return self

    @property
    def format(self) -> Format:
        """The format of the quantized weights; of `as-is` the source says it (`PublishedScheme`)."""
        return self.method

    @property
    def needs_calibration(self) -> bool:
        """Whether the backend needs text."""
        return self.method != AS_IS and (self.method not in WITHOUT_MODEL or self.kv_cache is not None)

    @property
    def mixed_schemes(self) -> dict[str, Scheme]:
        """The schemes that a layer of a mixture can have, by name: ``w4a16-32``, ``fp8``; empty for other methods."""
        sizes = [(name, size) for name in self.formats for size in GROUP_SIZES[name]]
        return {
            name if size == -1 else f"{name}-{size}": Scheme(method=name, backend=self.backend, group_size=size)
            for name, size in sizes
        }

    @property
    def parameters(self) -> dict[str, str | bool | int | float | None]:
        """What a release records beside method and backend."""
        left_out = {"method", "backend", "budget", "formats", *(GPTQ_ONLY if self.format != "gptq" else ())}
        mixed = {} if self.budget is None else {"budget": str(self.budget), "formats": ", ".join(self.formats)}
        return self.model_dump(exclude=left_out) | mixed

    @property
    def not_served(self) -> str | None:
        """The key whose value vLLM refuses on every device, or None if vLLM serves the scheme."""
        if self.format != "gptq":
            return None
        if self.bits not in _SERVED_BITS:
            return "bits"
        if not self.symmetric:
            return "symmetric"
        # With one group for a whole row, the order of columns makes no difference.
        return "desc_act" if self.desc_act and self.group_size > 0 else None

    def unsupported(self, instruction_set: InstructionSet, *, experts: bool = False) -> str | None:
        """Say why vLLM can't serve the scheme on such a CPU, of a model with routed ``experts``; None if it can.

        Read in vLLM 0.32, `kernels/linear` and `layers/fused_moe`; experts in FP8, AWQ and GPTQ tried with AVX-512.
        """
        named = f"`method: {self.method}`" if self.method == self.format else f"the format `{self.format}`"
        if self.format in {"nvfp4", "mxfp4", "mxfp4-experts"}:
            return f"vLLM has no kernel for {named} on CPUs"
        if experts and not (instruction_set == "amx" and self.format in _EXPERTS_BY_AMX):
            return "vLLM has no kernel for quantized experts on this CPU"
        if self.format in {"fp8-block", "fp8-scale-inv"} and instruction_set != "amx":
            return f"vLLM's kernel for {named} on CPUs needs AMX, and this one has {instruction_set}"
        return None

    @property
    def quantized_at_run_time(self) -> tuple[str, ...]:
        """What vLLM quantizes beside the stored weights, in words; an engine that only unpacks weights does not."""
        inputs = [_INPUTS[name] for name in (self.formats or (self.format,)) if name in _INPUTS]
        return (*inputs, *(["keys and values in FP8"] if self.kv_cache else []))


class PublishedScheme(Scheme):
    """`as-is`, with what the source's config.json says of the quantized weights."""

    published: Format
    """The format."""

    @model_validator(mode="after")
    def _supported(self) -> Self:
        return self

    @property
    def format(self) -> Format:
        """The format of the quantized weights."""
        return self.published

    @property
    def parameters(self) -> dict[str, str | bool | int | float | None]:
        """What a release records beside method and backend."""
        return {key: value for key, value in super().parameters.items() if key != "published"}


def either(choices: Sequence[object]) -> str:
    """``4``; ``2, 3 or 4``; words in backticks."""
    words = [f"`{choice}`" if isinstance(choice, str) else str(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
