"""Whether a LoRA adapter belongs to a model, and vLLM serves it: from its configuration and safetensors headers alone.

An adapter is what PEFT writes: ``adapter_config.json``, and ``adapter_model.safetensors`` with two matrices a layer,
``base_model.model.LAYER.lora_A.weight`` [rank, in] and ``lora_B.weight`` [out, rank]. vLLM skips a layer that the model
does not have, and what it can't apply it may leave out: so all of it is checked here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.compatibility.description import FLOATS, ModelDescription
from pipeline.compatibility.safetensors_headers import Tensor
from registry.bounded_json import Bounds, DocumentError, read_json

CONFIGURATION, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BOUNDS = Bounds(bytes=1 << 20, values=100_000, depth=8)
# The largest rank that vLLM 0.32 has room for (`vllm/config/lora.py`, MaxLoRARanks).
_LARGEST_RANK = 512
_AROUND_DECODER = frozenset({"model", "language_model"})
_MATRIX = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
_MOST_PROBLEMS, _LONGEST_SHOWN = 5, 100
# Settings of PEFT under which an adapter is more than two matrices a layer; vLLM 0.32 refuses each
# (`vllm/lora/peft_helper.py`).
_REFUSED = (
    "alora_invocation_tokens", "layer_replication", "lora_bias", "modules_to_save", "trainable_token_indices",
    "use_bdlora", "use_dora", "use_qalora",
)  # fmt: skip
# Initializations that change the model's own weights, so that the adapter alone is not what was trained.
_CHANGING_THE_BASE = re.compile(r"(pissa.*|olora|corda|loftq)", re.IGNORECASE)


class AdapterError(ValueError):
    """An adapter's configuration can't be read, or is not that of an adapter that can be served."""


class AdapterConfiguration(BaseModel):
    """What is read of an ``adapter_config.json``; PEFT writes many more keys."""

    model_config = ConfigDict(frozen=True, extra="allow")

    peft_type: str
    r: int = Field(ge=1, le=_LARGEST_RANK)
    lora_alpha: float = Field(gt=0, allow_inf_nan=False)
    target_modules: tuple[str, ...] | str
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    rank_pattern: Mapping[str, int] = Field(default_factory=dict)

    @field_validator("rank_pattern", mode="before")
    @classmethod
    def _none(cls, given: Any) -> Any:  # noqa: ANN401 - JSON
        return {} if given is None else given

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max([self.r, *self.rank_pattern.values()])


def read_configuration(raw: bytes) -> AdapterConfiguration:
    """Read an ``adapter_config.json``.

    Raises:
        AdapterError: it is not one, or the engine does not serve such an adapter; the message says which key.
    """
    try:
        found = AdapterConfiguration.model_validate(read_json(raw, BOUNDS))
    except DocumentError as error:
        raise AdapterError(f"{CONFIGURATION} can't be read: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = first["loc"][0] if first["loc"] else "document"
        raise AdapterError(f"{CONFIGURATION}: `{key}`: {first['msg']}") from error
    if problems := list(_not_served(found)):
        raise AdapterError(f"{CONFIGURATION}: {'; '.join(problems)}")
    return found


def modules(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the last names of the layers that an adapter changes, such as ``q_proj``."""
    found = (_MATRIX.fullmatch(name) for name in tensors)
    return sorted({match["layer"].rpartition(".")[2] for match in found if match})


def find_problems(
    configuration: AdapterConfiguration, tensors: Mapping[str, Tensor], model: ModelDescription | None
) -> list[str]:
    """Return what is wrong with an adapter's matrices, for this ``model``; without one, by themselves.

    Only linear layers of the decoder can be changed: of a changed output head or embedding, an evaluation by the
    likelihood of prompts would see nothing.
    """
    problems: list[str] = []
    sides: dict[str, dict[str, Tensor]] = {}
    for name in sorted(tensors):
        match = _MATRIX.fullmatch(name)
        if match is None:
            problems.append(f"{_shown(name)} is not a matrix of a LoRA adapter (`….lora_A.weight`, `….lora_B.weight`)")
        else:
            sides.setdefault(match["layer"], {})[match["side"]] = tensors[name]
    if not sides:
        problems.append(f"{WEIGHTS} has no matrix of a LoRA adapter")
    linears = None if model is None else {_within(name): tensor for name, tensor in model.linears.items()}
    for layer, pair in sides.items():
        wrong = list(_layer_problems(layer, pair, configuration.rank))
        problems += wrong if wrong or linears is None else _misfits(layer, pair, linears)
    more = [f"and {len(problems) - _MOST_PROBLEMS} more"] if len(problems) > _MOST_PROBLEMS else []
    return problems[:_MOST_PROBLEMS] + more


def _not_served(found: AdapterConfiguration) -> Iterator[str]:
    if found.peft_type != "LORA":
        yield f"`peft_type` is {_shown(found.peft_type)}: only `LORA` is served"
    if found.bias != "none":
        yield f"`bias` is {_shown(found.bias)}: the engine serves adapters without trained biases only (`none`)"
    if any(not 1 <= rank <= _LARGEST_RANK for rank in found.rank_pattern.values()):
        yield f"`rank_pattern` has a rank that is not between 1 and {_LARGEST_RANK}"
    if isinstance(found.init_lora_weights, str) and _CHANGING_THE_BASE.fullmatch(found.init_lora_weights):
        yield (
            f"`init_lora_weights` is {_shown(found.init_lora_weights)}, which changes the model's own weights: convert "
            "the adapter with PEFT (`path_initial_model_for_weight_conversion`)"
        )
    for key in _REFUSED:
        if (found.model_extra or {}).get(key):
            yield f"`{key}` is set: the engine does not serve such adapters"


def _layer_problems(layer: str, pair: Mapping[str, Tensor], rank: int) -> Iterator[str]:
    if missing := [side for side in "AB" if side not in pair]:
        yield f"{_shown(layer)} has no lora_{missing[0]}"
        return
    for side, matrix in pair.items():
        if len(matrix.shape) != 2 or 0 in matrix.shape:
            yield f"{_shown(layer)}: lora_{side} has the shape {list(matrix.shape)[:8]}: expected two dimensions"
            return
        if matrix.dtype not in FLOATS:
            yield f"{_shown(layer)}: lora_{side} is of {matrix.dtype}: expected one of {', '.join(sorted(FLOATS))}"
    down, up = pair["A"].shape, pair["B"].shape
    if down[0] != up[1] or down[0] > rank:
        yield f"{_shown(layer)}: lora_A and lora_B have the ranks {down[0]} and {up[1]}, and the configuration {rank}"


def _misfits(layer: str, pair: Mapping[str, Tensor], linears: Mapping[str, Tensor]) -> Iterator[str]:
    linear = linears.get(_within(layer))
    if linear is None:
        yield f"{_shown(layer)} is not a linear layer of the model's decoder"
        return
    outputs, inputs = pair["B"].shape[0], pair["A"].shape[-1]
    if (outputs, inputs) != linear.shape:
        yield (
            f"{_shown(layer)}: the adapter is for {inputs} inputs and {outputs} outputs, the layer has "
            f"{linear.shape[1]} and {linear.shape[0]}"
        )


def _within(layer: str) -> str:
    """A layer's name without what libraries put before the decoder, each in its own way."""
    return ".".join(part for part in layer.split(".") if part not in _AROUND_DECODER)


def _shown(text: str) -> str:
    """A text from a file as part of one line, whatever is in it."""
    cut = text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
    return f"`{cut}`" if cut.isprintable() else repr(cut)
