"""One description of a model, from config.json and safetensors headers; planner, quantizers and checks share it.

Every tensor has one role. ``linears`` are what quantization is meant for: two-dimensional weights inside the numbered
layers of the decoder. Beside them stand what no format here packs (experts fused into one tensor of three dimensions,
layers that draft tokens) and what stays at 16 bits (routers, norms, embeddings, heads, vision and audio towers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.compatibility import backends
from pipeline.compatibility.safetensors_headers import Tensor

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate|[^.]*_router)\.weight$")
# Inside numbered layers and of two dimensions, but no linear layer.
_EXEMPT = re.compile(r"(^|\.)([^.]*norm[^.]*|[^.]*embed[^.]*)\.weight$")
# Other towers of a multimodal model: quantizing one is a known mistake.
_TOWER = re.compile(r"(^|\.)(vision|visual|audio|image|multi_modal)[^.]*\.")
# Layers that predict more than one token; transformers does not load them.
_DRAFTING = re.compile(r"(^|\.)mtp[^.]*\.")
# Masks and counters that older checkpoints store beside the weights, as integers.
_BUFFER = re.compile(r"\.(bias|masked_bias|position_ids|num_batches_tracked)$")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")


@dataclass(frozen=True)
class ModelDescription:
    """A model as its ``config`` and the headers of its ``tensors`` describe it; nothing else is read."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def architecture(self) -> str:
        """The ``model_type`` of config.json, by which transformers and the backends choose their code."""
        found = self.config.get("model_type")
        return found if isinstance(found, str) and found else "unknown"

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of config.json that describes the decoder: of a multimodal model its ``text_config``."""
        return text_config(self.config)

    @cached_property
    def linears(self) -> Mapping[str, Tensor]:
        """The decoder's linear layers by name (without ``.weight``), in order of name; shapes are [out, in]."""
        return {name.removesuffix(".weight"): self.tensors[name] for name in sorted(self.tensors) if self._linear(name)}

    @cached_property
    def fused_experts(self) -> Mapping[str, Tensor]:
        """Experts that are stored as one tensor of three dimensions or more."""
        return {
            name: tensor
            for name, tensor in sorted(self.tensors.items())
            if "expert" in name and len(tensor.shape) > 2 and _TOWER.search(name) is None
        }

    @cached_property
    def routers(self) -> frozenset[str]:
        """The linear layers that choose experts, by name without ``.weight``; they stay at 16 bits."""
        return frozenset(name.removesuffix(".weight") for name in self.tensors if self._in_layer(name, _ROUTER))

    @cached_property
    def drafting(self) -> tuple[str, ...]:
        """The tensors of layers that only draft tokens (multi-token prediction)."""
        return tuple(name for name in sorted(self.tensors) if self._drafts(name))

    @cached_property
    def towers(self) -> tuple[str, ...]:
        """The tensors of vision and audio towers, which stay at 16 bits."""
        return tuple(name for name in sorted(self.tensors) if _TOWER.search(name))

    @cached_property
    def quantized_dtypes(self) -> Mapping[str, str]:
        """Weights that are not floating point of 16 bits or more, name → dtype: the model is quantized already."""
        return {
            name: tensor.dtype
            for name, tensor in sorted(self.tensors.items())
            if tensor.dtype not in FLOATS and len(tensor.shape) > 1 and _BUFFER.search(name) is None
        }

    @cached_property
    def tied(self) -> bool:
        """Whether the head is the input embedding: as config.json says, or as the architecture's class has it."""
        for part in (self.config, self.text_config):
            if isinstance(part.get("tie_word_embeddings"), bool):
                return bool(part["tie_word_embeddings"])
        return backends.ties_embeddings(self.architecture)

    @property
    def lacks_head(self) -> bool:
        """Whether it is a language model with neither an output head of its own nor one tied to the embedding.

        A head has as many rows as the vocabulary, as the embedding does; one such matrix alone is the embedding.
        """
        vocabulary = self.text_config.get("vocab_size")
        architectures = self.config.get("architectures")
        named = [str(name) for name in architectures] if isinstance(architectures, list) else []
        if self.tied or not any("ForCausalLM" in name or "ForConditionalGeneration" in name for name in named):
            return False
        rows = [tensor.shape[0] for name, tensor in self.tensors.items() if len(tensor.shape) == 2 and outside(name)]
        return isinstance(vocabulary, int) and sum(count >= vocabulary for count in rows) == 1

    def is_in_decoder(self, name: str) -> bool:
        """Whether a tensor stands in one of the decoder's numbered layers."""
        return not outside(name) and _TOWER.search(name) is None

    def _linear(self, name: str) -> bool:
        return (
            self._in_layer(name)
            and name.endswith(".weight")
            and _EXEMPT.search(name) is None
            and _ROUTER.search(name) is None
            and not self._drafts(name)
        )

    def _in_layer(self, name: str, pattern: re.Pattern[str] = _LAYER) -> bool:
        return (
            len(self.tensors[name].shape) == 2
            and not outside(name)
            and pattern.search(name) is not None
            and _TOWER.search(name) is None
        )

    def _drafts(self, name: str) -> bool:
        if _DRAFTING.search(name):
            return True
        layer = _LAYER.search(name)
        count = next((self.text_config[key] for key in _LAYER_COUNTS if _is_count(self.text_config.get(key))), None)
        return layer is not None and count is not None and _TOWER.search(name) is None and int(layer[1]) >= count


def outside(name: str) -> bool:
    """Whether a tensor stands outside all numbered layers."""
    return _LAYER.search(name) is None


def in_layer(name: str) -> str:
    """A module's name within its layer: ``model.layers.3.mlp.experts.7.up_proj`` is ``mlp.experts.7.up_proj``."""
    return re.sub(r"^(?:.*?\.)??\d+\.", "", name)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the decoder."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, Mapping) else config


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0
