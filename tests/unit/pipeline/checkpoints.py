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


def quantized(method: str, bits: int, group_size: int, source: Tensors | None = None) -> Tensors:
    """The same model as a quantizer would store it, or another ``source``: each weight rounded to the nearest."""
    source = unquantized() if source is None else source
    tensors = {name: value for name, value in source.items() if name.removesuffix(".weight") not in linears()}
    for name in linears():
        tensors |= packed(name, source[f"{name}.weight"].astype(np.float32), method, bits, group_size)
    return tensors


def packed(name: str, weight: NDArray[np.float32], method: str, bits: int, group_size: int) -> Tensors:
    """One linear layer [out, in] as a format packs it, in groups of ``group_size`` inputs or -1, symmetric."""
    out, inputs = weight.shape
    size = inputs if group_size == -1 else group_size
    groups = weight.reshape(out, inputs // size, size)
    middle = 2 ** (bits - 1)
    scales = np.maximum(np.abs(groups).max(2) / (middle - 0.5), 1e-5).astype(np.float16)
    values = np.clip(np.round(groups / scales[:, :, None]) + middle, 0, 2**bits - 1).astype(np.uint32)
    values = values.reshape(out, inputs).T
    zeros = np.full((inputs // size, out), middle if method == "awq" else middle - 1, np.uint32)
    found: Tensors = {f"{name}.scales": np.ascontiguousarray(scales.T)}
    if method == "awq":
        return found | {
            f"{name}.qweight": _words(_interleaved(values), bits),
            f"{name}.qzeros": _words(_interleaved(zeros), bits),
        }
    return found | {
        f"{name}.qweight": np.ascontiguousarray(_words(values.T, bits).T),
        f"{name}.qzeros": _words(zeros, bits),
        f"{name}.g_idx": (np.arange(inputs) // size).astype(np.int32),
    }


def _interleaved(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Eight outputs in the order that AWQ stores them in."""
    return values.reshape(values.shape[0], -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(values.shape)


def _words(values: NDArray[np.uint32], bits: int) -> NDArray[np.int32]:
    """Each row as one stream of bits, the lowest first, cut into words of 32."""
    apart = (values[:, :, None] >> np.arange(bits, dtype=np.uint32)) & 1
    stream = np.packbits(apart.reshape(values.shape[0], -1).astype(np.uint8), axis=1, bitorder="little")
    return np.ascontiguousarray(stream).view("<i4")


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
