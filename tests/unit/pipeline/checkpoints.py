"""Tiny models and quantized checkpoints for tests, written with the safetensors library itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

HIDDEN, INNER, VOCABULARY, LAYERS = 64, 128, 96, 2
Tensors = dict[str, NDArray[Any]]


def linears() -> dict[str, tuple[int, int]]:
    """Every linear layer of the decoder, with its weight's shape, [out, in]."""
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    return {f"model.layers.{n}.{name}": shape for n in range(LAYERS) for name, shape in shapes.items()}


def unquantized() -> Tensors:
    generator = np.random.default_rng(0)

    def weight(*shape: int) -> NDArray[Any]:
        return generator.standard_normal(shape).astype(np.float16)

    tensors = {f"{name}.weight": weight(*shape) for name, shape in linears().items()}
    tensors |= {f"model.layers.{n}.input_layernorm.weight": weight(HIDDEN) for n in range(LAYERS)}
    return tensors | {
        "model.embed_tokens.weight": weight(VOCABULARY, HIDDEN),
        "model.norm.weight": weight(HIDDEN),
        "lm_head.weight": weight(VOCABULARY, HIDDEN),
    }


def quantized(method: str, bits: int, group_size: int) -> Tensors:
    """The same model as a quantizer would store it: right in dtypes and shapes, meaningless in values."""
    tensors = {name: value for name, value in unquantized().items() if name.removesuffix(".weight") not in linears()}
    for name, (out, inputs) in linears().items():
        groups = inputs // group_size
        packed = (inputs, out * bits // 32) if method == "awq" else (inputs * bits // 32, out)
        tensors[f"{name}.qweight"] = np.zeros(packed, np.int32)
        tensors[f"{name}.qzeros"] = np.zeros((groups, out * bits // 32), np.int32)
        tensors[f"{name}.scales"] = np.ones((groups, out), np.float16)
        if method == "gptq":
            tensors[f"{name}.g_idx"] = (np.arange(inputs) // group_size).astype(np.int32)
    return tensors


def quantization_config(method: str, bits: int, group_size: int) -> dict[str, Any]:
    common = {"quant_method": method, "bits": bits, "group_size": group_size}
    if method == "awq":
        return common | {"zero_point": True, "version": "gemm", "modules_to_not_convert": None}
    return common | {"sym": True, "desc_act": False, "checkpoint_format": "gptq", "lm_head": False}


def config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
        "torch_dtype": "float16",
    }


def write(folder: Path, tensors: Tensors, document: dict[str, Any]) -> Path:
    """Write a model's folder: weights, configuration and tokenizer, readable by anybody."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(document))
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}}}')
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


def write_source(folder: Path) -> Path:
    return write(folder, unquantized(), config())


def write_quantized(folder: Path, method: str = "awq", bits: int = 4, group_size: int = 32) -> Path:
    document = config() | {"quantization_config": quantization_config(method, bits, group_size)}
    return write(folder, quantized(method, bits, group_size), document)
