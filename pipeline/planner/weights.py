"""The size of the weights in each scheme, from the tensors' headers, exactly as the packed formats store them.

A linear layer of [out, in] at b bits in groups of s takes, in bytes, with g = ceil(in / s):

    AWQ    out*in*b/8  +  g*out*2 (scales)  +  g*out*b/8 (zeros)
    GPTQ   the same    +  4*in (the group of each input)

Everything else, embeddings, norms and the head among it, stays as it is, at 16 bits. So "4 bits" in groups of 128 are
4.16 over the quantized layers, and more over the whole model.

A CPU's server may hold float32 copies in place of them (`containers/runtimes/slipway_kernels`), 4 bytes a weight: of
16-bit layers where the CPU does not multiply bfloat16 (of the head, beside its 16-bit weight); of layers packed at 4
bits, eight times as much, where it has no AVX-512; of those packed at 8 bits on every CPU, for vLLM has no kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from containers.hardware.cpu import InstructionSet
from pipeline.compatibility.description import FLOATS, ModelDescription
from pipeline.compatibility.safetensors_headers import Tensor
from pipeline.compatibility.scheme import Scheme
from pipeline.planner.facts import ModelFacts
from pipeline.quantization import mixture
from pipeline.quantization.formats import compressed_tensors, mxfp4_experts
from pipeline.quantization.published import Published

FP16 = "fp16"
_FLOAT32_BYTES = 4
_SCALE_BYTES = 2  # of a scale of an FP8 cache
_PACKED_BITS = 4  # of vLLM's kernel on CPUs
_PACKED_PARTS = (
    *("qweight", "qzeros", "scales", "g_idx"),
    *("weight_packed", "weight_scale", "weight_scale_inv", "weight_shape", "weight_global_scale", "input_global_scale"),
)
# Weights of 8 bits that any CPU multiplies as they are stored (`torch._scaled_mm`, oneDNN), and schemes that have them.
_MULTIPLIED_AS_STORED, _EIGHT_BITS = ("F8_E4M3", "I8"), ("fp8", "fp8-block", "w8a8")
_IN_SQUARES = ("fp8-block", "fp8-scale-inv")
# Of a `quant_method` that implies them.
_BITS = {"fp8": 8, "mxfp4": 4}
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"


@dataclass(frozen=True)
class Weights:
    """The weights in one scheme: ``bytes`` of all tensors, of which ``packed`` are those of the quantized layers.

    ``numbers`` counts the model's weights, ``linear`` those in linear layers, ``quantized`` those in quantized layers,
    ``head`` those that give a token's probabilities. ``bits`` is the scheme's.
    """

    scheme: str
    bytes: int
    packed: int
    numbers: int
    quantized: int
    bits: int
    group_size: int | None
    linear: int
    head: int
    as_stored: bool = False
    """Whether a CPU multiplies the quantized layers as they are stored, whatever it can do."""
    squares: bool = False
    """Whether a scale stands for a square of weights, so that outputs come in groups of ``group_size`` too."""

    def on_cpu(self, instruction_set: InstructionSet) -> int:
        """Bytes that they take in a CPU runtime's server on such a CPU, with float32 copies in place of weights."""
        multiplies = instruction_set in {"avx512_bf16", "amx"}
        in_place = self.bits == _PACKED_BITS and instruction_set != "avx2" if self.quantized else multiplies
        in_place = in_place or self.as_stored
        stored = self.packed or 2 * self.linear
        kept = stored if in_place else _FLOAT32_BYTES * self.linear
        return self.bytes - stored + kept + (0 if multiplies else _FLOAT32_BYTES * self.head)

    @property
    def bits_per_weight(self) -> float:
        """Bits a quantized weight takes, with its share of scales, zeros and indices; of a model that isn't, of all."""
        return 8 * self.packed / self.quantized if self.quantized else 8 * self.bytes / self.numbers


def unquantized(model: ModelDescription) -> Weights:
    """The weights as served without a scheme: 16 bits a number, what is stored in less (FP8, MXFP4) as it is stored.

    Layers that only draft tokens are not loaded.
    """
    drafting = set(model.drafting)
    tensors = {name: tensor for name, tensor in model.tensors.items() if name not in drafting}
    size = sum(_at_16_bits(tensor) for tensor in tensors.values())
    linear = sum(math.prod(tensor.shape) for tensor in model.linears.values())
    return Weights(FP16, size, 0, _numbers(tensors), 0, 16, None, linear, _head(tensors))


def quantized(name: str, scheme: Scheme, model: ModelDescription) -> Weights:
    """The weights as ``scheme`` packs them: the decoder's linear layers and nothing else; of a mixture at most."""
    linears = {f"{key}.weight": tensor for key, tensor in model.linears.items()}
    packed = mixture.packed_bytes(model, scheme)
    rest = sum(_at_16_bits(tensor) for key, tensor in model.tensors.items() if key not in linears)
    rest += _SCALE_BYTES * len(compressed_tensors.cache_scales(model)) if scheme.kv_cache else 0
    weights = sum(math.prod(tensor.shape) for tensor in linears.values())
    return Weights(
        name, packed + rest, packed, _numbers(model.tensors), weights, scheme.bits, scheme.group_size, weights,
        _head(model.tensors), scheme.method in _EIGHT_BITS, scheme.method in _IN_SQUARES,
    )  # fmt: skip


def taken(name: str, found: Published) -> Weights:
    """The weights of a checkpoint that is released as it is."""
    scheme = found.scheme
    size, squares = scheme.group_size, scheme.format in _IN_SQUARES
    return replace(stored(found.checkpoint), scheme=name, group_size=size, squares=squares)


def stored(model: ModelDescription) -> Weights:
    """The weights of a checkpoint as they lie there, packed or not, without layers that only draft tokens."""
    drafting = set(model.drafting)
    packed = {name: each for name, each in model.tensors.items() if _is_packed(name, each) and name not in drafting}
    rest = unquantized(replace(model, tensors={name: model.tensors[name] for name in model.tensors.keys() - packed}))
    if not packed:
        return rest
    bits, size = _stored_bits(model.config["quantization_config"]), sum(tensor.bytes for tensor in packed.values())
    ends = (".qweight", ".weight_packed", ".weight", mxfp4_experts.BLOCKS)
    values = [tensor for name, tensor in packed.items() if name.endswith(ends)]
    numbers = sum(tensor.bytes * 8 // (8 if tensor.dtype in _MULTIPLIED_AS_STORED else bits) for tensor in values)
    return replace(
        rest, scheme="", bytes=rest.bytes + size, packed=size, numbers=rest.numbers + numbers, quantized=numbers,
        bits=bits, linear=numbers, as_stored=all(tensor.dtype in _MULTIPLIED_AS_STORED for tensor in values),
    )  # fmt: skip


def _is_packed(name: str, tensor: Tensor) -> bool:
    last = name.rpartition(".")[2]
    if name.endswith((mxfp4_experts.BLOCKS, mxfp4_experts.SCALES)):
        return True
    return last in _PACKED_PARTS or (last == "weight" and tensor.dtype in _MULTIPLIED_AS_STORED)


def _stored_bits(quantization: Mapping[str, Any]) -> int:
    """The bits of a quantized weight: of AWQ and GPTQ, or of compressed-tensors; of a mixture the least."""
    if (method := quantization.get("quant_method")) in _BITS:
        return _BITS[method]
    groups = list((quantization.get("config_groups") or {}).values())
    return min(int(group["weights"]["num_bits"]) for group in groups) if groups else int(quantization["bits"])


def is_weight_only(config: Mapping[str, Any]) -> bool:
    """Say whether a checkpoint with this config.json keeps activations in 16 bits, as AWQ, GPTQ and FP16 do."""
    quantization = config.get("quantization_config") or {}
    groups = (quantization.get("config_groups") or {}).values()
    return quantization.get("quant_method") != "fp8" and not any(group.get("input_activations") for group in groups)


def bytes_per_step(weights: Weights, facts: ModelFacts, requests: int) -> float:
    """Bytes of weights that one decoding step of so many requests reads.

    The input embedding is looked up, not read through, unless it is the head too. Of routed experts only those are read
    that some request is sent to: of E experts, with k a token and n requests that choose alike and by chance,
    E (1 - (1 - k/E)^n).
    """
    looked_up = 0 if facts.tied else 2 * facts.embedding
    if not facts.all_experts:
        return weights.bytes - looked_up
    number_bytes = weights.packed / weights.quantized if weights.quantized else weights.bytes / weights.numbers
    idle = (1 - facts.experts_per_token / facts.experts) ** requests
    return weights.bytes - looked_up - facts.all_experts * number_bytes * idle


def active_numbers(weights: Weights, facts: ModelFacts) -> float:
    """How many weights take part in a token: all but the input embedding and the experts that it isn't sent to."""
    embedding = 0 if facts.tied else facts.embedding
    unused = facts.all_experts * (1 - facts.experts_per_token / facts.experts) if facts.experts else 0
    return max(0.0, weights.numbers - embedding - unused)


def _head(tensors: Mapping[str, Tensor]) -> int:
    """A model without a head of its own multiplies with its input embedding."""
    for suffix in (_HEAD, _EMBEDDING):
        found = [math.prod(tensor.shape) for name, tensor in tensors.items() if name.endswith(suffix)]
        if found:
            return max(found)
    return 0


def _numbers(tensors: Mapping[str, Tensor]) -> int:
    """Count weights: scales are none, and a byte of an MXFP4 block holds two."""
    return sum(
        math.prod(tensor.shape) * (2 if name.endswith(mxfp4_experts.BLOCKS) else 1)
        for name, tensor in tensors.items()
        if not name.endswith(("_scale_inv", mxfp4_experts.SCALES))
    )


def _at_16_bits(tensor: Tensor) -> int:
    return 2 * math.prod(tensor.shape) if tensor.dtype in FLOATS else tensor.bytes
