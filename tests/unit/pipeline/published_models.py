"""Models that people release, described as their published checkpoints are: config.json, and every tensor's shape.

The shapes follow from config.json by each architecture's own naming, so that no header of gigabytes is kept here; the
published number of parameters checks them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.compatibility.description import ModelDescription, text_config
from pipeline.compatibility.safetensors_headers import Tensor

FOLDER = Path(__file__).parents[2] / "data" / "planned_models"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}

Shapes = Iterator[tuple[str, str, tuple[int, ...]]]


def published(name: str) -> dict[str, Any]:
    """The file of a model: its ``config``, where it is from, and its published number of ``parameters``."""
    return dict(json.loads((FOLDER / f"{name}.json").read_text()))


def model(name: str) -> ModelDescription:
    """The model as its config.json and the headers of its files describe it."""
    config = published(name)["config"]
    made = {"llama": _dense, "mistral": _dense, "qwen3_moe": _qwen3_moe, "deepseek_v3": _deepseek,
            "gemma3": _gemma3, "gpt_oss": _gpt_oss}[config["model_type"]]  # fmt: skip
    tensors = {
        key: Tensor(dtype, shape, 0, _BYTES[dtype] * math.prod(shape), Path("x")) for key, dtype, shape in made(config)
    }
    return ModelDescription(config, tensors)


def _named(shapes: Mapping[str, tuple[int, ...]], prefix: str = "", suffix: str = ".weight") -> Shapes:
    for name, shape in shapes.items():
        yield f"{prefix}{name}{suffix}", "BF16", shape


def _ends(config: Mapping[str, Any]) -> Shapes:
    hidden, words = config["hidden_size"], config["vocab_size"]
    yield from _named({"model.embed_tokens": (words, hidden), "lm_head": (words, hidden), "model.norm": (hidden,)})


def _attention(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden = config["hidden_size"]
    size = config.get("head_dim") or hidden // config["num_attention_heads"]
    inner, kept = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    return {
        "self_attn.q_proj": (inner, hidden), "self_attn.k_proj": (kept, hidden), "self_attn.v_proj": (kept, hidden),
        "self_attn.o_proj": (hidden, inner),
    }  # fmt: skip


def _feed_forward(hidden: int, inner: int, prefix: str = "mlp") -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj": (inner, hidden), f"{prefix}.up_proj": (inner, hidden),
        f"{prefix}.down_proj": (hidden, inner),
    }  # fmt: skip


def _norms(hidden: int, *names: str) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names or ("input_layernorm", "post_attention_layernorm"), (hidden,))


def _dense(config: Mapping[str, Any]) -> Shapes:
    hidden = config["hidden_size"]
    layer = {**_attention(config), **_feed_forward(hidden, config["intermediate_size"]), **_norms(hidden)}
    yield from _ends(config)
    for number in range(config["num_hidden_layers"]):
        yield from _named(layer, f"model.layers.{number}.")


def _qwen3_moe(config: Mapping[str, Any]) -> Shapes:
    hidden, size = config["hidden_size"], config["head_dim"]
    layer = {**_attention(config), **_norms(hidden), **_norms(size, "self_attn.q_norm", "self_attn.k_norm")}
    layer["mlp.gate"] = (config["num_experts"], hidden)
    for expert in range(config["num_experts"]):
        layer |= _feed_forward(hidden, config["moe_intermediate_size"], f"mlp.experts.{expert}")
    yield from _ends(config)
    for number in range(config["num_hidden_layers"]):
        yield from _named(layer, f"model.layers.{number}.")


def _deepseek(config: Mapping[str, Any]) -> Shapes:
    """In FP8 with a scale for each block of 128 by 128; the layer after the last drafts tokens."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rank, query, rotary = config["kv_lora_rank"], config["q_lora_rank"], config["qk_rope_head_dim"]
    key, value = config["qk_nope_head_dim"], config["v_head_dim"]
    attention: dict[str, tuple[int, ...]] = {
        "self_attn.q_a_proj": (query, hidden), "self_attn.q_b_proj": (heads * (key + rotary), query),
        "self_attn.kv_a_proj_with_mqa": (rank + rotary, hidden),
        "self_attn.kv_b_proj": (heads * (key + value), rank), "self_attn.o_proj": (hidden, heads * value),
    }  # fmt: skip
    norms = {
        **_norms(hidden), **_norms(query, "self_attn.q_a_layernorm"), **_norms(rank, "self_attn.kv_a_layernorm"),
    }  # fmt: skip
    yield from _ends(config)
    layers = config["num_hidden_layers"]
    for number in range(layers + config["num_nextn_predict_layers"]):
        linears, prefix = dict(attention), f"model.layers.{number}."
        if number < config["first_k_dense_replace"]:
            linears |= _feed_forward(hidden, config["intermediate_size"])
        else:
            inner = config["moe_intermediate_size"]
            linears |= _feed_forward(hidden, inner * config["n_shared_experts"], "mlp.shared_experts")
            for expert in range(config["n_routed_experts"]):
                linears |= _feed_forward(hidden, inner, f"mlp.experts.{expert}")
            yield f"{prefix}mlp.gate.weight", "BF16", (config["n_routed_experts"], hidden)
            yield f"{prefix}mlp.gate.e_score_correction_bias", "F32", (config["n_routed_experts"],)
        for name, (out, inputs) in linears.items():
            yield f"{prefix}{name}.weight", "F8_E4M3", (out, inputs)
            yield f"{prefix}{name}.weight_scale_inv", "F32", (-(-out // 128), -(-inputs // 128))
        yield from _named(norms, prefix)
        if number >= layers:
            words = config["vocab_size"]
            yield from _named({"eh_proj": (hidden, 2 * hidden), "embed_tokens": (words, hidden),
                               "shared_head.head": (words, hidden), **_norms(hidden, "enorm", "hnorm",
                               "shared_head.norm")}, prefix)  # fmt: skip


def _gemma3(config: Mapping[str, Any]) -> Shapes:
    text, vision = text_config(config), config["vision_config"]
    hidden, size = text["hidden_size"], text["head_dim"]
    layer = {
        **_attention(text), **_feed_forward(hidden, text["intermediate_size"]),
        **_norms(hidden, "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                 "post_feedforward_layernorm"),
        **_norms(size, "self_attn.q_norm", "self_attn.k_norm"),
    }  # fmt: skip
    yield from _named({"model.embed_tokens": (262208, hidden), "model.norm": (hidden,)}, "language_model.")
    for number in range(text["num_hidden_layers"]):
        yield from _named(layer, f"language_model.model.layers.{number}.")
    wide, inner = vision["hidden_size"], vision["intermediate_size"]
    square = {f"self_attn.{name}_proj": (wide, wide) for name in ("q", "k", "v", "out")}
    with_bias = {**square, "mlp.fc1": (inner, wide), "mlp.fc2": (wide, inner),
                 **_norms(wide, "layer_norm1", "layer_norm2")}  # fmt: skip
    tower = "vision_tower.vision_model."
    for number in range(vision["num_hidden_layers"]):
        prefix = f"{tower}encoder.layers.{number}."
        yield from _named(with_bias, prefix)
        yield from _named({name: shape[:1] for name, shape in with_bias.items()}, prefix, ".bias")
    patch, places = vision["patch_size"], (vision["image_size"] // vision["patch_size"]) ** 2
    yield from _named({"embeddings.patch_embedding": (wide, 3, patch, patch), "post_layernorm": (wide,),
                       "embeddings.position_embedding": (places, wide)}, tower)  # fmt: skip
    yield from _named({"embeddings.patch_embedding": (wide,), "post_layernorm": (wide,)}, tower, ".bias")
    yield "multi_modal_projector.mm_input_projection_weight", "BF16", (wide, hidden)
    yield "multi_modal_projector.mm_soft_emb_norm.weight", "BF16", (wide,)


def _gpt_oss(config: Mapping[str, Any]) -> Shapes:
    """Experts in MXFP4: blocks of 32 weights in 16 bytes, with a byte of scale for each."""
    hidden, inner, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    attention = _attention(config)
    yield from _ends(config)
    for number in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{number}."
        yield from _named({**attention, "mlp.router": (experts, hidden), **_norms(hidden)}, prefix)
        yield from _named({**{name: shape[:1] for name, shape in attention.items()}, "mlp.router": (experts,)}, prefix,
                          ".bias")  # fmt: skip
        yield f"{prefix}self_attn.sinks", "BF16", (config["num_attention_heads"],)
        for name, out, inputs in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            yield f"{prefix}mlp.experts.{name}_blocks", "U8", (experts, out, inputs // 32, 16)
            yield f"{prefix}mlp.experts.{name}_scales", "U8", (experts, out, inputs // 32)
            yield f"{prefix}mlp.experts.{name}_bias", "BF16", (experts, out)
