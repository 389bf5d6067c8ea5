"""Heads of EAGLE-3 for tests, as their authors publish them, with random weights: what they draft is never right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Tensors = dict[str, NDArray[Any]]
# The layers of the model whose hidden states the head reads.
_READ = (1, 2, 3)


def head_weights(config: Mapping[str, Any]) -> Tensors:
    """The head's tensors, of one layer as wide as those of the model with this ``config``."""
    generator = np.random.default_rng(0)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    queries, keys = (count * config["head_dim"] for count in (heads, kv_heads))
    shapes = {
        "fc": (hidden, len(_READ) * hidden),
        "lm_head": (config["vocab_size"], hidden),
        "midlayer.self_attn.q_proj": (queries, 2 * hidden),
        "midlayer.self_attn.k_proj": (keys, 2 * hidden),
        "midlayer.self_attn.v_proj": (keys, 2 * hidden),
        "midlayer.self_attn.o_proj": (hidden, queries),
        "midlayer.mlp.gate_proj": (inner, hidden),
        "midlayer.mlp.up_proj": (inner, hidden),
        "midlayer.mlp.down_proj": (hidden, inner),
    }
    norms = ("norm", *(f"midlayer.{name}" for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")))
    matrices = {name: 0.02 * generator.standard_normal(shape) for name, shape in shapes.items()}
    tensors = matrices | {name: np.ones(hidden) for name in norms}
    return {f"{name}.weight": value.astype(np.float16) for name, value in tensors.items()}


def write_head(
    folder: Path, config: Mapping[str, Any], tensors: Tensors | None = None, changes: Mapping[str, Any] | None = None
) -> Path:
    """Write a head for the model with this ``config``: other ``tensors``, or ``changes`` of its own config.json."""
    own = {
        "num_hidden_layers": 1,
        "draft_vocab_size": config["vocab_size"],
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(_READ)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(head_weights(config) if tensors is None else tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, **own, **(changes or {})}))
    return folder
