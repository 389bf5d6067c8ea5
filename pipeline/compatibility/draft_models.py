"""Whether a model can draft tokens for another: from both configurations and the headers of their weights.

`draft` is a language model of its own that has the other's vocabulary. `eagle3` is a head of one layer or more: its
matrix ``fc`` joins hidden states of the other model, and its own vocabulary may be a part of the other's, which ``d2t``
then maps. vLLM 0.32 loads both so (`vllm/config/speculative.py`, `model_executor/models/llama_eagle3.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.compatibility.description import ModelDescription, Role, text_config

# The heads that vLLM 0.32 has (`model_executor/models/registry.py`), also named without `Eagle3` in front.
_HEADS = frozenset({
    "Eagle3DeepseekV2ForCausalLM", "Eagle3DeepseekV3ForCausalLM", "Eagle3LlamaForCausalLM",
    "Eagle3MiniMaxM2ForCausalLM", "Eagle3Qwen2_5vlForCausalLM", "Eagle3Qwen3ForCausalLM", "Eagle3Qwen3vlForCausalLM",
    "LlamaForCausalLMEagle3",
})  # fmt: skip
# Of heads in the format of the library `speculators`, by the `model_type` of their layers.
_SPECULATORS = frozenset({"llama", "qwen3"})
_JOINING, _MAP = "fc.weight", "d2t"
_LONGEST_SHOWN = 60


def layers_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a draft model's config.json that describes its layers; `speculators` puts it into another."""
    nested = config.get("transformer_layer_config")
    return {**config, **nested} if isinstance(nested, Mapping) else text_config(config)


def find_problems(method: str, draft: ModelDescription, model: ModelDescription) -> list[str]:
    """Return why a model can't draft tokens for another, by ``draft`` or ``eagle3``; empty if it can."""
    return list({"draft": _no_draft, "eagle3": _no_head}[method](draft, model))


def _no_draft(draft: ModelDescription, model: ModelDescription) -> Iterator[str]:
    if not draft.of(Role.EMBEDDING) or draft.lacks_head or _JOINING in draft.tensors:
        yield "it is not a language model of its own; a head that was trained for this model takes `method: eagle3`"
    yield from _other_vocabulary(draft, model)


def _no_head(draft: ModelDescription, model: ModelDescription) -> Iterator[str]:
    if not _is_head(draft.config):
        named = draft.config.get("architectures")
        yield (
            f"config.json has `architectures: {str(named)[:_LONGEST_SHOWN]}`: expected a head of EAGLE-3, such as "
            "`LlamaForCausalLMEagle3`; a language model of its own takes `method: draft`"
        )
    joining, hidden = draft.tensors.get(_JOINING), model.text_config.get("hidden_size")
    if joining is None or len(joining.shape) != 2:
        yield f"it has no matrix `{_JOINING}`, which joins the model's hidden states: it is not a head of EAGLE-3"
    elif not isinstance(hidden, int) or joining.shape[1] % hidden:
        yield (
            f"`{_JOINING}` has {joining.shape[1]:,} inputs, and the model's hidden states {hidden} numbers: it was "
            "trained for another model"
        )
    yield from _other_vocabulary(draft, model)
    own, whole = draft.config.get("draft_vocab_size"), _vocabulary(model.text_config)
    if own is not None and own != whole and _MAP not in draft.tensors:
        yield f"its own vocabulary has {own} tokens, and it has no `{_MAP}`, which maps them to the model's {whole}"


def _is_head(config: Mapping[str, Any]) -> bool:
    if "speculators_model_type" in config:
        kind = layers_config(config).get("model_type")
        return config["speculators_model_type"] == "eagle3" and kind in _SPECULATORS
    named = config.get("architectures")
    first = str(named[0]) if isinstance(named, list) and named else ""
    return first in _HEADS or f"Eagle3{first}" in _HEADS


def _other_vocabulary(draft: ModelDescription, model: ModelDescription) -> Iterator[str]:
    own, wanted = _vocabulary(layers_config(draft.config)), _vocabulary(model.text_config)
    if own != wanted:
        yield f"config.json has a vocabulary of {own} tokens, and the model {wanted}: choose one with its tokenizer"


def _vocabulary(config: Mapping[str, Any]) -> object:
    return config.get("vocab_size")
