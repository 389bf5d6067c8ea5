"""Write tests/data/model_families.json: config.json and headers of two-layer models, as transformers saves them.

Run it with an environment that has a current transformers and torch, the gptqmodel worker's::

    PYTHON tests/make_model_families.py tests/data/model_families.json
    PYTHON tests/make_model_families.py tests/data/model_families.json DIRECTORY    # and keep the models
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, __version__

_DENSE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 2048, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MOE = {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2}
_LINEAR_ATTENTION = {
    "linear_num_value_heads": 48, "linear_num_key_heads": 16, "linear_value_head_dim": 16, "linear_key_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "ministral3": {},
    "smollm3": {"no_rope_layers": [1, 0], "layer_types": ["full_attention", "full_attention"]},
    "phi3": {},
    # Phi-4 has the architecture of Phi-3; Phi-4-mini ties its head and rotates part of each head.
    "phi4": {"model_type": "phi3", "tie_word_embeddings": True, "partial_rotary_factor": 0.75},
    "glm4": {},
    "gemma2": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
        "intermediate_size": [256, 256], "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 2048,
        "laurel_rank": 32, "activation_sparsity_pattern": [0.0, 0.0],
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _MOE,
    "qwen3_5_text": _LINEAR_ATTENTION,
    "qwen3_next": {**_LINEAR_ATTENTION, **_MOE, "shared_expert_intermediate_size": 128},
    "llama4_text": {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 256, "attention_chunk_size": 256,
    },
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"],
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {**_MOE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 32},
    "qwen3_vl": {
        "text_config": {**_DENSE, "rope_parameters": {"rope_theta": 10000.0, "mrope_section": [4, 6, 6]}},
        "vision_config": {
            "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 128,
            "deepstack_visual_indexes": [0], "patch_size": 16, "num_position_embeddings": 64,
        },
        "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8,
    },
    "gemma3": {
        "text_config": {**_DENSE, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 56, "patch_size": 14, "vision_use_head": False,
        },
        "mm_tokens_per_image": 4, "boi_token_index": 5, "eoi_token_index": 6, "image_token_index": 7,
    },
    "voxtral": {
        "text_config": {**_DENSE, "model_type": "llama"},
        "audio_config": {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_mel_bins": 16, "max_source_positions": 64,
        },
        "audio_token_id": 5,
    },
    "deepseek_v3": {
        "moe_intermediate_size": 128, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
        "head_dim": None, "first_k_dense_replace": 1, "num_key_value_heads": 4,
    },
}  # fmt: skip


def describe(model_type: str, changes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make a model, save it in ``folder`` and return its configuration and its headers."""
    torch.manual_seed(0)
    several = "text_config" in changes
    settings = dict(changes) if several else {k: v for k, v in (_DENSE | changes).items() if v is not None}
    config = AutoConfig.for_model(settings.pop("model_type", model_type), **settings)
    kind = AutoModelForMultimodalLM if several else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float16)
    model.save_pretrained(folder)
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, framework="pt") as stored:
        headers = {name: stored.get_slice(name) for name in sorted(stored.keys())}
        tensors = {name: [header.get_dtype(), *header.get_shape()] for name, header in headers.items()}
    return {"config": json.loads((folder / "config.json").read_text()), "tensors": tensors}


def main() -> None:
    """Describe every family in the file that the first argument names."""
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(sys.argv[2] if len(sys.argv) > 2 else scratch)
        families = {name: describe(name, changes, kept / name) for name, changes in _FAMILIES.items()}
    lines = (f" {json.dumps(name)}: {json.dumps(found)}" for name, found in families.items())
    Path(sys.argv[1]).write_text(f'{{"transformers": "{__version__}", "families": {{\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main()
