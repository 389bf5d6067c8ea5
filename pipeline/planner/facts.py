"""The facts in a model's config.json that determine memory and speed: layers, heads, caches, experts.

What a layer keeps for one token, in numbers of the cache's dtype, on each GPU of a tensor-parallel group of ``t``:

    grouped-query   ceil(kv_heads / t) * 2 * head_dim   a key and a value for each key-value head; at least one head
    multi-latent    kv_lora_rank + qk_rope_head_dim     one latent that keys and values are made from, and the rotary
                                                        part of the key, whole on every GPU (arXiv:2405.04434, 2.1)
    sliding window  as grouped-query, for the last ``window`` tokens alone (and those of the batch under way)

These are the page sizes of vLLM's ``FullAttentionSpec``, ``MLAAttentionSpec`` and ``SlidingWindowSpec``; a test
compares them with vLLM's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.compatibility.description import EXPERT_COUNTS, ModelDescription, text_config
from pipeline.errors import PlanError

# Other names that older architectures have for the same.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "context": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
}
_WINDOWED = ("sliding_attention", "chunked_attention")
_FULL = "full_attention"
# Every how many layers the experts stand.
_EXPERT_STEPS = ("decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step")
# Kinds of rotary scaling that extend the context which config.json states; with others it is stated extended.
_SCALING = ("linear", "dynamic", "ntk")
_STATED_SCALED_FAMILY = "gemma3"
_LARGEST_FACTOR = 1024
# Keys of architectures whose layers keep a state of fixed size, or caches of more than one kind (MiMo V2).
_STATES = ("ssm_cfg", "mamba_d_state", "linear_num_key_heads", "hybrid_layer_pattern")
# What a config.json may leave to its class in transformers, where that has other defaults than 0 or null.
_CLASS_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "gemma3_text": {
        "max_position_embeddings": 131072, "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256,
    },
}  # fmt: skip
# More than any model has; it bounds lists whose length config.json determines.
_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps for a token: ``numbers`` for each of ``heads``; of the last ``window`` tokens, or all."""

    heads: int
    numbers: int
    window: int | None = None

    def numbers_on_gpu(self, tensor_parallel: int) -> int:
        """How many numbers a token takes on each of so many GPUs; a head is never divided, a latent has one."""
        return math.ceil(self.heads / tensor_parallel) * self.numbers


@dataclass(frozen=True)
class ModelFacts:
    """A model as its configuration describes it; sizes count numbers, not bytes.

    ``embedding`` is the input embedding alone. ``experts`` of each of ``expert_layers`` hold ``expert_numbers`` numbers
    each; ``experts_per_token`` of them answer for a token. All are 0 in a dense model.
    """

    architecture: str
    layers: tuple[LayerCache, ...]
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    latent: bool
    intermediate: int
    vocabulary: int
    context: int
    tied: bool
    experts: int = 0
    experts_per_token: int = 0
    expert_layers: int = 0
    expert_numbers: int = 0

    @property
    def embedding(self) -> int:
        """Numbers in the input embedding, of which a step reads a row a token."""
        return self.vocabulary * self.hidden

    @property
    def all_experts(self) -> int:
        """Numbers in all routed experts."""
        return self.expert_layers * self.experts * self.expert_numbers

    @property
    def attention(self) -> str:
        """What kind of cache it has, in words."""
        windows = sorted({layer.window for layer in self.layers if layer.window is not None})
        kind = "multi-latent" if self.latent else "multi-head" if self.kv_heads == self.heads else "grouped-query"
        if not windows:
            return kind
        windowed = sum(layer.window is not None for layer in self.layers)
        return f"{kind}, sliding window of {windows[0]:,} in {windowed} of {len(self.layers)} layers"

    def kv_bytes_per_token(self, number_bytes: float = 2, tensor_parallel: int = 1) -> int:
        """Bytes that one more token takes on each GPU, in all layers, as an engine lays out its pages."""
        return int(number_bytes * sum(layer.numbers_on_gpu(tensor_parallel) for layer in self.layers))

    def kv_bytes(self, context: int, number_bytes: float = 2, tensor_parallel: int = 1, batched_tokens: int = 0) -> int:
        """Bytes that one request of ``context`` tokens keeps on each GPU.

        A layer with a window keeps ``window - 1`` tokens and those that the running step brings (``batched_tokens``),
        as vLLM's ``SlidingWindowSpec`` counts.
        """
        held = 0
        for layer in self.layers:
            tokens = context if layer.window is None else min(context, layer.window - 1 + max(batched_tokens, 1))
            held += tokens * layer.numbers_on_gpu(tensor_parallel)
        return int(number_bytes * held)


def read_facts(config: Mapping[str, Any]) -> ModelFacts:
    """Read a config.json, in which any number may be one for all layers or a list with one for each.

    Raises:
        PlanError: it lacks a key that the cache's size depends on, or has layers of an unknown kind.
    """
    tied = ModelDescription(config, {}).tied
    config = text_config(config)
    config = {**_CLASS_DEFAULTS.get(str(config.get("model_type")), {}), **config}
    layers = _required(config, "layers")
    if layers > _MOST_LAYERS:
        raise PlanError(f"config.json has {layers:,} layers: expected at most {_MOST_LAYERS:,}")
    hidden, heads = _required(config, "hidden", layers), _required(config, "heads", layers)
    kv_heads = _kv_heads(config, layers, heads)
    head_dim = _per_layer(config, "head_dim", layers) or [max(1, hidden // heads)] * layers
    rank, rotary = _largest(config, "kv_lora_rank", layers), _largest(config, "qk_rope_head_dim", layers)
    latent = bool(rank and rotary)
    shared = _largest(config, "num_kv_shared_layers", layers)  # the last layers, which read an earlier one's cache
    caches = []
    for layer, window in enumerate(_windows(config, layers)):
        own_heads = 0 if layer >= layers - shared else 1 if latent else kv_heads[layer]
        caches.append(LayerCache(own_heads, rank + rotary if latent else 2 * head_dim[layer], window))
    experts = next((count for name in EXPERT_COUNTS if (count := _largest(config, name, layers))), 0)
    intermediate = _largest(config, "intermediate_size", layers)
    expert_hidden = _largest(config, "moe_intermediate_size", layers) or intermediate
    return ModelFacts(
        architecture=_architecture(config),
        layers=tuple(caches),
        hidden=hidden,
        heads=heads,
        kv_heads=max(kv_heads),
        head_dim=max(head_dim),
        latent=latent,
        intermediate=intermediate or _largest(config, "n_inner", layers) or 4 * hidden,
        vocabulary=_largest(config, "vocab_size", layers),
        context=_context(config, layers),
        tied=tied,
        experts=experts,
        experts_per_token=_largest(config, "num_experts_per_tok", layers) if experts else 0,
        expert_layers=_expert_layers(config, layers) if experts else 0,
        # A gated network: up, gate and down.
        expert_numbers=3 * hidden * expert_hidden if experts else 0,
    )


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    return str(named[0] if isinstance(named, list) and named else config.get("model_type", "unknown"))


def _context(config: Mapping[str, Any], layers: int) -> int:
    """The longest context in tokens, as vLLM 0.32 has it: what is stated, times the factor of rotary scaling."""
    stated = _required(config, "context", layers, default=2048)
    rotary = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rotary, Mapping) or str(config.get("model_type")).startswith(_STATED_SCALED_FAMILY):
        return stated
    kinds = [rotary, *(each for each in rotary.values() if isinstance(each, Mapping))]
    factors = [each.get("factor") for each in kinds if each.get("rope_type", each.get("type")) in _SCALING]
    given = [factor for factor in factors if isinstance(factor, int | float) and 1 <= factor <= _LARGEST_FACTOR]
    return int(stated * max(given, default=1))


def _required(config: Mapping[str, Any], name: str, layers: int = 1, default: int | None = None) -> int:
    """The number that architectures give under one of several keys; the largest, where each layer has its own."""
    for key in _NAMES[name]:
        if found := _largest(config, key, layers):
            return found
    if default is not None:
        return default
    raise PlanError(f"config.json has no `{_NAMES[name][0]}`, so the size of the KV cache can't be computed")


def _largest(config: Mapping[str, Any], key: str, layers: int) -> int:
    """The number under a key, the largest of a list; 0 where there is none."""
    return max(_per_layer(config, key, layers), default=0)


def _per_layer(config: Mapping[str, Any], key: str, layers: int) -> list[int]:
    """The number under ``key`` for each layer; empty where the key is missing, null or 0 for all."""
    value = config.get(key)
    if value is None or value is False or value == 0:
        return []
    if type(value) is int and value > 0:
        return [value] * layers
    if isinstance(value, list) and len(value) == layers and all(_is_natural(number) for number in value):
        return list(value)
    found = json.dumps(value, default=repr)
    raise PlanError(
        f"config.json has `{key}` {found[:60]}: expected a number, or a list of {layers} with one for each layer"
    )


def _indices(config: Mapping[str, Any], key: str) -> set[int]:
    """The layers that a list names by their numbers; empty where there is none."""
    value = config.get(key)
    if value is None:
        return set()
    if not isinstance(value, list) or not all(_is_natural(number) for number in value):
        raise PlanError(f"config.json has `{key}` {json.dumps(value, default=repr)[:60]}: expected a list of layers")
    return set(value)


def _is_natural(value: object) -> bool:
    return (type(value) is int and value >= 0) or type(value) is bool


def _kv_heads(config: Mapping[str, Any], layers: int, heads: int) -> list[int]:
    for key in ("num_key_value_heads", "n_head_kv", "num_kv_heads"):
        if found := _per_layer(config, key, layers):
            return found
    return [1 if config.get("multi_query") else heads] * layers


def _expert_layers(config: Mapping[str, Any], layers: int) -> int:
    """How many layers have routed experts: the first ones and some others may be dense."""
    if isinstance(config.get("moe_layer_freq"), list):
        return sum(bool(has) for has in _per_layer(config, "moe_layer_freq", layers))
    if named := _indices(config, "moe_layers"):
        return len(named)
    dense = _indices(config, "mlp_only_layers") | set(range(_largest(config, "first_k_dense_replace", layers)))
    step = next((found for key in _EXPERT_STEPS if (found := _largest(config, key, layers))), 1)
    return sum(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))


def _windows(config: Mapping[str, Any], layers: int) -> Sequence[int | None]:
    """The window of each layer, None where it sees everything."""
    kinds = config.get("layer_types")
    window = _largest(config, "sliding_window", layers) or _largest(config, "attention_chunk_size", layers)
    if kinds is not None:
        listed = [str(kind) for kind in kinds] if isinstance(kinds, list) else []
        unknown = sorted(set(listed) - {_FULL, *_WINDOWED})
        if unknown or len(listed) != layers:
            what = ", ".join(f"`{kind}`" for kind in unknown) or f"{len(listed)} of them for {layers} layers"
            raise PlanError(f"config.json has `layer_types` with {what}: the KV cache of such a layer is not known")
        return [window if window and kind in _WINDOWED else None for kind in listed]
    if state := next((key for key in _STATES if config.get(key)), None):
        raise PlanError(f"config.json has `{state}`: the state or cache of such layers is not known")
    if not window or config.get("use_sliding_window") is False:
        return [None] * layers
    return [window if _slides(config, layer, layers) else None for layer in range(layers)]


def _slides(config: Mapping[str, Any], layer: int, layers: int) -> bool:
    """Whether a layer has the model's window, in the architectures that say so by a rule instead of a list."""
    kind = str(config.get("model_type", ""))
    if kind.startswith("gemma3"):
        return (layer + 1) % (_largest(config, "sliding_window_pattern", layers) or 6) != 0
    if kind.startswith("llama4"):
        # 1 where a layer has rotary positions, and with them chunks; an empty list is the class's own rule.
        rotary = _per_layer(config, "no_rope_layers", layers) if config.get("no_rope_layers") else []
        return bool(rotary[layer]) if rotary else (layer + 1) % 4 != 0
    if kind == "gemma2":
        return layer % 2 == 0
    if config.get("use_sliding_window"):
        return layer >= _largest(config, "max_window_layers", layers)
    return True
