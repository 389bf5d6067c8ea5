"""Whether a LoRA adapter belongs to a model, and can be served or merged: from its configuration and headers alone.

An adapter is what PEFT writes: ``adapter_config.json``, and ``adapter_model.safetensors`` with two matrices a layer,
``base_model.model.LAYER.lora_A.weight`` [rank, in] and ``lora_B.weight`` [out, rank], and for DoRA a vector,
``lora_magnitude_vector`` [out]. vLLM skips a layer that the model does not have, and what it can't apply it may leave
out: so all of it is checked here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.compatibility.description import FLOATS, ModelDescription
from pipeline.compatibility.safetensors_headers import Tensor
from registry.bounded_json import Bounds, DocumentError, read_json

CONFIGURATION, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BOUNDS = Bounds(bytes=1 << 20, values=100_000, depth=8)
# The largest rank that vLLM 0.32 has room for (`vllm/config/lora.py`, MaxLoRARanks).
_LARGEST_RANK = 512
_AROUND_DECODER = frozenset({"model", "language_model"})
_PART = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?:(?P<side>[AB])\.weight|magnitude_vector)")
_MOST_PROBLEMS, _LONGEST_SHOWN = 5, 100
# Settings of PEFT 0.21 under which an adapter is more than two matrices a layer, or another product of them; vLLM 0.32
# refuses most (`vllm/lora/peft_helper.py`).
_REFUSED = (
    "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication", "lora_bias",
    "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora",
    "velora_config",
)  # fmt: skip
# Initializations that change the model's own weights, so that the adapter alone is not what was trained.
_CHANGING_THE_BASE = re.compile(r"(pissa.*|olora|corda|loftq|lora_ga|mica)", re.IGNORECASE)

Use = Literal["served", "merged"]
"""Whether the engine applies an adapter, or it becomes part of the weights, which DoRA's can only so."""


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
    use_dora: bool = False
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = Field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = Field(default_factory=dict)

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _none(cls, given: Any) -> Any:  # noqa: ANN401 - JSON
        return {} if given is None else given

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max([self.r, *self.rank_pattern.values()])


class AdaptedLayer(BaseModel):
    """A layer in an adapter's file: PEFT's name of it, and the names of its tensors, by what they are (``lora_A``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    parts: Mapping[str, str]


def read_configuration(raw: bytes, use: Use = "served") -> AdapterConfiguration:
    """Read an ``adapter_config.json``.

    Raises:
        AdapterError: it is not one, or such an adapter is not served or merged; the message says which key.
    """
    try:
        found = AdapterConfiguration.model_validate(read_json(raw, BOUNDS))
    except DocumentError as error:
        raise AdapterError(f"{CONFIGURATION} can't be read: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = first["loc"][0] if first["loc"] else "document"
        raise AdapterError(f"{CONFIGURATION}: `{key}`: {first['msg']}") from error
    if problems := list(_unusable(found, use)):
        raise AdapterError(f"{CONFIGURATION}: {'; '.join(problems)}")
    return found


def modules(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the last names of the layers that an adapter changes, such as ``q_proj``."""
    return sorted({layer.rpartition(".")[2] for layer in _parts(tensors)})


def adapted_layers(tensors: Mapping[str, Tensor], model: ModelDescription) -> dict[str, AdaptedLayer]:
    """Return the layer of an adapter for each weight of the model that it changes, by the weight's name.

    Both must have been checked by `find_problems`.
    """
    weights = {_within(name): f"{name}.weight" for name in model.linears}
    return {weights[_within(layer)]: AdaptedLayer(name=layer, parts=parts) for layer, parts in _parts(tensors).items()}


def find_problems(
    configuration: AdapterConfiguration, tensors: Mapping[str, Tensor], model: ModelDescription | None
) -> list[str]:
    """Return what is wrong with an adapter's matrices, for this ``model``; without one, by themselves.

    Only linear layers of the decoder can be changed: of a changed output head or embedding, an evaluation by the
    likelihood of prompts would see nothing.
    """
    parts = _parts(tensors)
    known = {name for layer in parts.values() for name in layer.values()}
    problems = [
        f"{_shown(name)} is not a matrix of a LoRA adapter (`….lora_A.weight`, `….lora_B.weight`)"
        for name in sorted(tensors.keys() - known)
    ]
    if not parts:
        problems.append(f"{WEIGHTS} has no matrix of a LoRA adapter")
    linears = None if model is None else {_within(name): tensor for name, tensor in model.linears.items()}
    seen: set[str] = set()
    for layer, names in parts.items():
        layer_tensors = {part: tensors[name] for part, name in names.items()}
        wrong = list(_layer_problems(layer, layer_tensors, configuration))
        if _within(layer) in seen:
            wrong.append(f"{_shown(layer)} is there twice, under two names")
        seen.add(_within(layer))
        problems += wrong if wrong or linears is None else _misfits(layer, layer_tensors, linears)
        if not _is_listed(layer, configuration.target_modules):
            problems.append(f"{_shown(layer)} is not among the `target_modules` of {CONFIGURATION}")
    more = [f"and {len(problems) - _MOST_PROBLEMS} more"] if len(problems) > _MOST_PROBLEMS else []
    return problems[:_MOST_PROBLEMS] + more


def _unusable(found: AdapterConfiguration, use: Use) -> Iterator[str]:
    if found.peft_type != "LORA":
        yield f"`peft_type` is {_shown(found.peft_type)}: only `LORA` can be {use}"
    if found.bias != "none":
        yield f"`bias` is {_shown(found.bias)}: only adapters without trained biases can be {use} (`none`)"
    if any(not 1 <= rank <= _LARGEST_RANK for rank in found.rank_pattern.values()):
        yield f"`rank_pattern` has a rank that is not between 1 and {_LARGEST_RANK}"
    if isinstance(found.init_lora_weights, str) and _CHANGING_THE_BASE.fullmatch(found.init_lora_weights):
        yield (
            f"`init_lora_weights` is {_shown(found.init_lora_weights)}, which changes the model's own weights: convert "
            "the adapter with PEFT (`path_initial_model_for_weight_conversion`)"
        )
    for key in _REFUSED:
        if (found.model_extra or {}).get(key):
            yield f"`{key}` is set: such adapters can't be {use}"
    if found.use_dora and use == "served":
        yield "`use_dora` is set: the engine does not serve such adapters; merge it instead (`source.adapter`)"


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """The names of each layer's tensors by what they are: ``lora_A``, ``lora_B`` and ``lora_magnitude_vector``."""
    found: dict[str, dict[str, str]] = {}
    for name in sorted(tensors):
        if match := _PART.fullmatch(name):
            part = f"lora_{match['side'] or 'magnitude_vector'}"
            found.setdefault(match["layer"], {})[part] = name
    return found


def _layer_problems(layer: str, parts: Mapping[str, Tensor], configuration: AdapterConfiguration) -> Iterator[str]:
    dimensions = {"lora_A": 2, "lora_B": 2, **({"lora_magnitude_vector": 1} if configuration.use_dora else {})}
    if missing := [part for part in dimensions if part not in parts]:
        yield f"{_shown(layer)} has no {missing[0]}"
        return
    if unexpected := parts.keys() - dimensions.keys():
        yield f"{_shown(layer)} has a {min(unexpected)}, and {CONFIGURATION} does not say `use_dora`"
        return
    for part, tensor in parts.items():
        if len(tensor.shape) != dimensions[part] or 0 in tensor.shape:
            expected = "two dimensions" if dimensions[part] == 2 else "one dimension"
            yield f"{_shown(layer)}: {part} has the shape {list(tensor.shape)[:8]}: expected {expected}"
            return
        if tensor.dtype not in FLOATS:
            yield f"{_shown(layer)}: {part} is of {tensor.dtype}: expected one of {', '.join(sorted(FLOATS))}"
    down, up = parts["lora_A"].shape, parts["lora_B"].shape
    if down[0] != up[1] or down[0] > configuration.rank:
        yield (
            f"{_shown(layer)}: lora_A and lora_B have the ranks {down[0]} and {up[1]}, and the configuration "
            f"{configuration.rank}"
        )


def _is_listed(layer: str, modules: tuple[str, ...] | str) -> bool:
    """Whether PEFT changes a layer; a pattern, which may take forever to match, is not tried."""
    return isinstance(modules, str) or any(f".{layer}".endswith(f".{module}") for module in modules)


def _misfits(layer: str, parts: Mapping[str, Tensor], linears: Mapping[str, Tensor]) -> Iterator[str]:
    linear = linears.get(_within(layer))
    if linear is None:
        yield f"{_shown(layer)} is not a linear layer of the model's decoder"
        return
    if linear.dtype not in FLOATS:
        yield f"{_shown(layer)} is of {linear.dtype} in the model: expected one of {', '.join(sorted(FLOATS))}"
    outputs, inputs = parts["lora_B"].shape[0], parts["lora_A"].shape[-1]
    if (outputs, inputs) != linear.shape:
        yield (
            f"{_shown(layer)}: the adapter is for {inputs} inputs and {outputs} outputs, the layer has "
            f"{linear.shape[1]} and {linear.shape[0]}"
        )
    magnitude = parts.get("lora_magnitude_vector")
    if magnitude is not None and magnitude.shape != linear.shape[:1]:
        yield f"{_shown(layer)}: lora_magnitude_vector has {magnitude.shape[0]} numbers for {linear.shape[0]} outputs"


def _within(layer: str) -> str:
    """A layer's name without what libraries put before the decoder, each in its own way."""
    return ".".join(part for part in layer.split(".") if part not in _AROUND_DECODER)


def _shown(text: str) -> str:
    """A text from a file as part of one line, whatever is in it."""
    cut = text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
    return f"`{cut}`" if cut.isprintable() else repr(cut)
