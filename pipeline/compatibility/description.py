"""One description of a model, from config.json and safetensors headers; planner, quantizers and checks share it.

Every tensor has one `Role`, found by its name, its shape and its neighbours, in no family's own code. ``linears`` are
what quantization is meant for: two-dimensional weights inside the numbered layers of the decoder. All else stays at 16
bits; experts that are fused into one tensor of three dimensions are what no packed format here holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from types import MappingProxyType
from typing import Any

from pipeline.compatibility import backends
from pipeline.compatibility.safetensors_headers import Tensor

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


class Role(StrEnum):
    """What a tensor is for."""

    LINEAR = "linear"
    """A linear layer of attention or of a dense feed-forward network."""
    EXPERT = "expert"
    """A linear layer of one routed expert."""
    SHARED_EXPERT = "shared expert"
    """A linear layer of an expert that every token goes to."""
    STATE = "state"
    """A linear layer of linear attention or of a state-space model."""
    FUSED_EXPERTS = "fused experts"
    """All experts of a layer in one tensor of three dimensions or more."""
    ROUTER = "router"
    """What chooses experts."""
    EMBEDDING = "embedding"
    """The input embedding, of tokens or of positions."""
    HEAD = "head"
    """The output head, where it is stored."""
    VISION = "vision"
    """A vision tower."""
    AUDIO = "audio"
    """An audio tower."""
    PROJECTOR = "projector"
    """What leads from a tower into the decoder, where it stands outside the tower."""
    DRAFTING = "drafting"
    """A part of a layer that only drafts tokens (multi-token prediction), its norms among them."""
    OTHER = "other"
    """Norms, biases, convolutions, and all that is left."""


LINEAR_ROLES = frozenset({Role.LINEAR, Role.EXPERT, Role.SHARED_EXPERT, Role.STATE})
TOWER_ROLES = (Role.VISION, Role.AUDIO, Role.PROJECTOR)

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
"""The keys of config.json under which architectures state how many routed experts a layer has."""
_ROUTER = re.compile(r"(^|\.)((gate|router|shared_expert_gate|[^.]*_router)\.weight$|router\.[^.]+\.weight$)")
# Inside numbered layers and of two dimensions, but no linear layer.
_EXEMPT = re.compile(r"(^|\.)([^.]*norm[^.]*|[^.]*embed[^.]*)\.weight$")
# Gemma 3n's, of which some are numbered though they stand in no layer.
_ALTUP = re.compile(r"(^|\.)altup[^.]*\.")
_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
_SHARED_EXPERT = re.compile(r"(^|\.)shared_(experts?|mlp)\.")
# Modules that stand beside a router; Granite's have neither `experts` in their names nor numbers.
_EXPERTS_MODULE = re.compile(r"(^|\.)(experts|block_sparse_moe)\.")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens[^.]*|[^.]*embeddings?|wte|wpe|embed_in|embed_positions)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
# Other towers of a multimodal model, and what leads from them: quantizing one is a known mistake.
_TOWERS = {
    Role.AUDIO: re.compile(r"(^|\.)(embed_)?(audio|speech)[^.]*\."),
    Role.VISION: re.compile(r"(^|\.)(embed_)?(vision|visual|image)[^.]*\."),
    Role.PROJECTOR: re.compile(r"(^|\.)(multi_modal|mm_projector|connector|perceiver)[^.]*\."),
}
# Layers that predict more than one token; transformers does not load them.
_DRAFTING = re.compile(r"(^|\.)mtp[^.]*\.")
# The decay of linear attention and state-space models: its neighbours are the parts of such a layer.
_DECAY = re.compile(r"\.A_log$")
# Masks and counters that older checkpoints store beside the weights, as integers.
_BUFFER = re.compile(r"\.(bias|masked_bias|position_ids|num_batches_tracked)$")
_IMAGE_TOKENS = ("image_token_id", "image_token_index")
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

    @property
    def accepts_images(self) -> bool:
        """Whether config.json describes a vision tower, or names a token that stands for an image."""
        tower = isinstance(self.config.get("vision_config"), Mapping)
        return tower or any(isinstance(self.config.get(key), int) for key in _IMAGE_TOKENS)

    @cached_property
    def roles(self) -> Mapping[str, Role]:
        """The role of every tensor, in order of name."""
        states = tuple(name.removesuffix("A_log") for name in self.tensors if _DECAY.search(name))
        return MappingProxyType({name: self._role(name, states) for name in sorted(self.tensors)})

    @cached_property
    def linears(self) -> Mapping[str, Tensor]:
        """The decoder's linear layers by name (without ``.weight``), in order of name; shapes are [out, in]."""
        return {
            name.removesuffix(".weight"): self.tensors[name]
            for name, role in self.roles.items()
            if role in LINEAR_ROLES and name.endswith(".weight")
        }

    @cached_property
    def fused_experts(self) -> Mapping[str, Tensor]:
        """Experts that are stored as one tensor of three dimensions or more."""
        return {name: self.tensors[name] for name in self.of(Role.FUSED_EXPERTS)}

    @cached_property
    def routers(self) -> frozenset[str]:
        """The linear layers that choose experts, by name without ``.weight``; they stay at 16 bits."""
        return frozenset(name.removesuffix(".weight") for name in self.of(Role.ROUTER) if name.endswith(".weight"))

    @cached_property
    def drafting(self) -> tuple[str, ...]:
        """The tensors of layers that only draft tokens (multi-token prediction)."""
        return self.of(Role.DRAFTING)

    @cached_property
    def towers(self) -> tuple[str, ...]:
        """The tensors of vision and audio towers and of their projectors, which stay as they are."""
        return self.of(*TOWER_ROLES)

    def of(self, *roles: Role) -> tuple[str, ...]:
        """The tensors of some roles, in order of name."""
        return tuple(name for name, role in self.roles.items() if role in roles)

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
        return not outside(name) and self.roles[name] not in TOWER_ROLES

    def _role(self, name: str, states: tuple[str, ...]) -> Role:  # noqa: PLR0911 - one line a role
        if tower := next((role for role, pattern in _TOWERS.items() if pattern.search(name)), None):
            return tower
        if self._drafts(name):
            return Role.DRAFTING
        dimensions = len(self.tensors[name].shape)
        if outside(name):
            embeds = dimensions == 2 and _EMBEDDING.search(name)
            return Role.EMBEDDING if embeds else Role.HEAD if _HEAD.search(name) else Role.OTHER
        if dimensions > 2 and _EXPERTS_MODULE.search(name):
            return Role.FUSED_EXPERTS
        if dimensions == 2 and _ROUTER.search(name):
            return Role.ROUTER
        if dimensions != 2 or not name.endswith(".weight") or _EXEMPT.search(name) or _ALTUP.search(name):
            return Role.OTHER
        if name.startswith(states):
            return Role.STATE
        if _SHARED_EXPERT.search(name):
            return Role.SHARED_EXPERT
        return Role.EXPERT if _EXPERT.search(name) else Role.LINEAR

    def _drafts(self, name: str) -> bool:
        if _DRAFTING.search(name):
            return True
        layer = _LAYER.search(name)
        count = next((self.text_config[key] for key in _LAYER_COUNTS if _is_count(self.text_config.get(key))), None)
        return layer is not None and count is not None and int(layer[1]) >= count and _ALTUP.search(name) is None


def outside(name: str) -> bool:
    """Whether a tensor stands outside all numbered layers."""
    return _LAYER.search(name) is None


def layer_of(name: str) -> str:
    """The layer that a tensor stands in: of ``model.layers.3.mlp.experts.7.up_proj`` it is ``model.layers.3``."""
    found = _LAYER.search(name)
    return "" if found is None else name[: found.end() - 1]


def in_layer(name: str) -> str:
    """A module's name within its layer: ``model.layers.3.mlp.experts.7.up_proj`` is ``mlp.experts.7.up_proj``."""
    return re.sub(r"^(?:.*?\.)??\d+\.", "", name)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the decoder."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, Mapping) else config


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a mixture of routed experts."""
    decoder = text_config(config)
    counts = (decoder.get(name) for name in EXPERT_COUNTS)
    return any(isinstance(count, int) and count > 1 for count in counts)


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0
