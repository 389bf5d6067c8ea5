"""What a model's config.json says that memory and speed follow from: layers, heads, what each layer caches, experts.

What a layer keeps for one token, in numbers of the cache's dtype, on each GPU of a tensor-parallel group of ``t``:

    grouped-query   ceil(kv_heads / t) * 2 * head_dim   a key and a value for each key-value head; at least one head
    multi-latent    kv_lora_rank + qk_rope_head_dim     one latent that keys and values are made from, and the rotary
                                                        part of the key, whole on every GPU (arXiv:2405.04434, 2.1)
    sliding window  as grouped-query, for the last ``window`` tokens alone (and those of the batch under way)

These are the page sizes of vLLM's ``FullAttentionSpec``, ``MLAAttentionSpec`` and ``SlidingWindowSpec``; a test asks
vLLM itself for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import PlanError

# Other names that older architectures have for the same.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "context": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
}
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
_WINDOWED = ("sliding_attention", "chunked_attention")
# Layers that keep a state of fixed size, or what nobody has told this program about.
_FULL = "full_attention"


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
    """Read a config.json.

    Raises:
        PlanError: it lacks what the cache's size follows from, or has layers that this program knows nothing of.
    """
    config = {**config, **config["text_config"]} if isinstance(config.get("text_config"), Mapping) else dict(config)
    layers, hidden, heads = (_number(config, name) for name in ("layers", "hidden", "heads"))
    kv_heads = _kv_heads(config, heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    latent = bool(config.get("kv_lora_rank")) and bool(config.get("qk_rope_head_dim"))
    if latent:
        one = LayerCache(1, int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"]))
    else:
        one = LayerCache(kv_heads, 2 * head_dim)
    caches = tuple(LayerCache(one.heads, one.numbers, window) for window in _windows(config, layers))
    experts = next((int(config[name]) for name in _EXPERTS if config.get(name)), 0)
    expert_hidden = int(config.get("moe_intermediate_size") or config.get("intermediate_size") or 0)
    return ModelFacts(
        architecture=str((config.get("architectures") or [config.get("model_type", "unknown")])[0]),
        layers=caches,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        latent=latent,
        intermediate=int(config.get("intermediate_size") or config.get("n_inner") or 4 * hidden),
        vocabulary=int(config.get("vocab_size") or 0),
        context=_number(config, "context", default=2048),
        tied=bool(config.get("tie_word_embeddings", False)),
        experts=experts,
        experts_per_token=int(config.get("num_experts_per_tok") or 0) if experts else 0,
        expert_layers=_expert_layers(config, layers) if experts else 0,
        # A gated network: up, gate and down.
        expert_numbers=3 * hidden * expert_hidden if experts else 0,
    )


def _number(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    for key in _NAMES[name]:
        if isinstance(config.get(key), int) and config[key] > 0:
            return int(config[key])
    if default is not None:
        return default
    raise PlanError(f"config.json has no `{_NAMES[name][0]}`: what this model keeps for a token can't be told")


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    for key in ("num_key_value_heads", "n_head_kv", "num_kv_heads"):
        if config.get(key):
            return int(config[key])
    return 1 if config.get("multi_query") else heads


def _expert_layers(config: Mapping[str, Any], layers: int) -> int:
    """How many layers have routed experts: the first ones and some others may be dense."""
    dense = set(config.get("mlp_only_layers") or ()) | set(range(int(config.get("first_k_dense_replace") or 0)))
    step = int(config.get("decoder_sparse_step") or config.get("moe_layer_freq") or 1)
    return sum(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))


def _windows(config: Mapping[str, Any], layers: int) -> Sequence[int | None]:
    """The window of each layer, None where it sees everything."""
    kinds = config.get("layer_types")
    window = config.get("sliding_window") or config.get("attention_chunk_size")
    if kinds is not None:
        unknown = sorted(set(kinds) - {_FULL, *_WINDOWED})
        if unknown or len(kinds) != layers:
            what = ", ".join(f"`{kind}`" for kind in unknown) or f"{len(kinds)} of them for {layers} layers"
            raise PlanError(f"config.json has `layer_types` with {what}: what such a layer keeps is not known here")
        return [int(window) if window and kind in _WINDOWED else None for kind in kinds]
    if any(config.get(key) for key in ("ssm_cfg", "mamba_d_state", "linear_num_key_heads")):
        raise PlanError("config.json describes layers with a state instead of a cache: that is not known here")
    if not window or config.get("use_sliding_window") is False:
        return [None] * layers
    return [int(window) if _slides(config, layer) else None for layer in range(layers)]


def _slides(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer has the model's window, in the architectures that say so by a rule instead of a list."""
    kind = str(config.get("model_type", ""))
    if kind.startswith("gemma3"):
        return (layer + 1) % int(config.get("sliding_window_pattern") or 6) != 0
    if kind == "gemma2":
        return layer % 2 == 0
    if config.get("use_sliding_window"):
        return layer >= int(config.get("max_window_layers") or 0)
    return True
