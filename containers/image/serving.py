"""How a model is served: the model file's section ``serve``, and one configuration that an image or a variant runs.

A key is set for all schemes. A scheme may override it, and a variant both. What a scheme or a variant can't override
is one for the model, because FP16's answers are compared with all of them, or because it is a file in the image.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, StringConstraints, model_validator

from containers.hardware.cpu import InstructionSet
from containers.hardware.gpu import gpus
from containers.image.profile import RuntimeProfile
from registry.manifest import ServedConfiguration

LONGEST_CONTEXT = 32768
"""A context longer than this is served only where the model file asks for it: its cache fits few machines."""
CHAT_TEMPLATE = "/serve/chat_template.jinja"
"""Where the image has the chat template of the model file."""
# Keys that neither a scheme nor a variant can override.
_FOR_THE_MODEL = frozenset({"adapters", "chat_template", "dtype", "variants"})
ADAPTERS = "/adapters"
"""Where the image has a folder for each LoRA adapter."""
DRAFT_MODEL = "/draft_model"
"""Where the image has the model that drafts tokens, if there is one."""
# The ranks that vLLM 0.32 has room for (`vllm/config/lora.py`): an adapter of another rank takes the next.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Keys that change no answer, but for the rounding that other batches bring.
_SPEED_AND_MEMORY = ("gpu_memory", "max_sequences", "batched_tokens", "prefix_caching")
# What FP16 is served with, whatever the file says.
_AS_FP16: Mapping[str, Any] = {"kv_cache": "auto", "speculative": None}
# What vLLM calls the methods of speculation.
_METHODS = {"ngram": "ngram", "draft": "draft_model", "eagle3": "eagle3"}
_BFLOAT16_SINCE = (8, 0)  # of a GPU's compute capability

ServedName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+([.-][a-z0-9]+)*$", max_length=63)]
ParserName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=63)]
Word = Annotated[str, StringConstraints(pattern=r"^[^\s\x00-\x1f\x7f]+$", max_length=4096)]
Dtype = Literal["float16", "bfloat16", "float32"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Adapter(_Section):
    """Where a LoRA adapter comes from."""

    uri: str
    """As in `source`; a relative folder counts from the model file."""
    revision: str | None = None
    """A commit, a tag or a branch of a hub; default `main`."""


class ServedAdapter(_Section):
    """What the engine must know of an adapter in the image, and the digest of the adapter's files."""

    digest: str
    rank: int
    modules: tuple[str, ...]
    """The last names of the layers that it changes, such as ``q_proj``."""


class DraftModel(_Section):
    """Where a model that drafts tokens comes from."""

    uri: str
    """As in `source`; a relative folder counts from the model file."""
    revision: str | None = None
    """A commit, a tag or a branch of a hub; default `main`."""


class Speculative(_Section):
    """Tokens that are drafted cheaply, and accepted where the model would have generated them."""

    method: Literal["ngram", "draft", "eagle3"]
    """`ngram` repeats what the prompt has, `draft` asks a smaller model with the same vocabulary, `eagle3` a head that
    was trained for this model.
    """
    source: DraftModel | None = Field(default=None, exclude=True)
    """The smaller model or the head; one for the whole model file, since it is a folder of the image."""
    tokens: int = Field(ge=1, le=64)
    """How many tokens are drafted at once."""

    @property
    def asks_a_model(self) -> bool:
        """Whether it takes a model of its own."""
        return self.method != "ngram"


class Override(_Section):
    """What a scheme or a variant may override. A key that is not set is left to the engine, if nothing else is said."""

    context: PositiveInt | None = None
    """Tokens of prompt and answer; by default what the model was made for, up to 32,768."""
    tensor_parallel: PositiveInt | None = None
    """GPUs that share each layer, by default 1; `slipway plan` proposes how many hold the model."""
    pipeline_parallel: PositiveInt = 1
    """Groups of GPUs that share the layers; a runtime for CPUs takes no such key."""
    kv_cache: Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2"] = "auto"
    """The KV cache's precision; `auto` is that of the model."""
    gpu_memory: float | None = Field(default=None, gt=0, le=1)
    """The fraction of a GPU's memory that the engine takes; a runtime for CPUs takes no such key."""
    max_sequences: PositiveInt | None = None
    """Requests that are computed at once."""
    batched_tokens: PositiveInt | None = None
    """Tokens that are computed in one step."""
    prefix_caching: bool | None = None
    """Whether the cache of a common beginning is shared by requests."""
    tool_calls: ParserName | None = None
    """The engine's parser of tool calls; it allows `tool_choice: auto`."""
    reasoning: ParserName | None = None
    """The engine's parser that separates reasoning from the answer."""
    speculative: Speculative | None = None
    """Speculative decoding: by ngrams, by a draft model, or by a head of EAGLE-3."""
    arguments: tuple[Word, ...] = ()
    """Further arguments of the engine, of those that are allowed and have no key."""

    @model_validator(mode="before")
    @classmethod
    def _only_keys_that_can_differ(cls, value: object) -> object:
        if cls is Override and isinstance(value, dict):
            for key in _FOR_THE_MODEL & value.keys():
                raise ValueError(f"`{key}` is one for the whole model: set `serve.{key}`")
        return value


class Serve(Override):
    """How the model is served."""

    dtype: Literal["auto"] | Dtype = "auto"
    """The precision of activations, and of weights that are not quantized, for FP16 and all schemes; `auto` is what the
    model was trained in if the device supports it.
    """
    chat_template: Path | None = None
    """A Jinja template in place of the model's own, as `file:PATH`; it is copied into the image."""
    adapters: Mapping[ServedName, Adapter] = Field(default_factory=dict)
    """LoRA adapters by the name under which they are served."""
    variants: Mapping[ServedName, Override] = Field(default_factory=dict)
    """Further configurations of the same image, each tested like the main one; `slipway serve --variant` starts one."""


class ServingConfiguration(Override):
    """One configuration that is served: the model's main one, or a ``variant``.

    As the model file says it, ``context`` and ``tensor_parallel`` may be None and ``dtype`` ``auto``; `resolved` fills
    them in. A resolved one is what commands, labels, manifests and cache keys are made from, as `document`.
    """

    variant: str | None = None
    dtype: Literal["auto"] | Dtype = "auto"
    chat_template: str | None = None
    """``sha256:…`` of the template in the image."""
    adapters: Mapping[str, ServedAdapter] = Field(default_factory=dict)
    """The adapters in the image, by name; empty until they have been pulled."""

    @property
    def drafts(self) -> bool:
        """Whether a model drafts tokens."""
        return self.speculative is not None and self.speculative.asks_a_model

    @property
    def gpus(self) -> int:
        """GPUs of one replica; on a CPU, the engine's processes."""
        return (self.tensor_parallel or 1) * self.pipeline_parallel

    def resolved(self, config: Mapping[str, Any], profile: RuntimeProfile) -> ServingConfiguration:
        """Return the configuration with every value known, for a model with this ``config.json`` in a runtime."""
        return self.model_copy(
            update={
                "context": self.context or default_context(config),
                "tensor_parallel": self.tensor_parallel or 1,
                "dtype": default_dtype(config, profile) if self.dtype == "auto" else self.dtype,
            }
        )

    @property
    def cache_bytes(self) -> int:
        """Bytes of a number in the KV cache."""
        return 1 if self.kv_cache.startswith("fp8") else 4 if self.dtype == "float32" else 2

    def reference(self) -> ServingConfiguration:
        """How FP16 is served to be compared with: a cache of full precision, and every token computed by the model."""
        return self.model_copy(update=_AS_FP16)

    def answering(self) -> ServingConfiguration:
        """The same without the keys that change speed and memory, and no answer."""
        return self.model_copy(update={"variant": None, **dict.fromkeys(_SPEED_AND_MEMORY)})

    def unsupported(self, instruction_set: InstructionSet) -> str | None:
        """Say what a CPU lacks for it; None where it can serve it. vLLM's CPU attention raises NotImplementedError."""
        if self.kv_cache == "auto" or instruction_set != "avx2":
            return None
        return (
            f"`kv_cache: {self.kv_cache}` needs a CPU with AVX-512 or AMX, and this one has {instruction_set}: "
            "test it on another machine"
        )

    def engine_arguments(self, profile: RuntimeProfile) -> tuple[str, ...]:
        """The arguments of a runtime's engine for all keys that differ from its defaults."""
        return tuple(self._words(profile))

    def _words(self, profile: RuntimeProfile) -> Iterator[str]:
        for flag, value, default in (
            ("--max-model-len", self.context, None),
            ("--dtype", self.dtype, None),
            ("--tensor-parallel-size", self.tensor_parallel or 1, 1),
            ("--pipeline-parallel-size", self.pipeline_parallel, 1),
            ("--kv-cache-dtype", self.kv_cache, "auto"),
            ("--gpu-memory-utilization", self.gpu_memory, None),
            ("--max-num-seqs", self.max_sequences, None),
            ("--max-num-batched-tokens", self.batched_tokens, None),
        ):
            if value != default:
                yield from (flag, str(value))
        if self.prefix_caching is not None:
            yield "--enable-prefix-caching" if self.prefix_caching else "--no-enable-prefix-caching"
        if self.chat_template is not None:
            yield from ("--chat-template", CHAT_TEMPLATE)
        if self.tool_calls is not None:
            yield from ("--enable-auto-tool-choice", "--tool-call-parser", self.tool_calls)
        if self.reasoning is not None:
            yield from ("--reasoning-parser", self.reasoning)
        if self.speculative is not None:
            method, tokens = _METHODS[self.speculative.method], self.speculative.tokens
            model = {"model": DRAFT_MODEL} if self.speculative.asks_a_model else {}
            drafting = {"method": method, **model, "num_speculative_tokens": tokens}
            yield from ("--speculative-config", json.dumps(drafting, separators=(",", ":")))
        if self.adapters:
            yield from self._adapter_words(profile)
        yield from self.arguments

    def _adapter_words(self, profile: RuntimeProfile) -> Iterator[str]:
        """All adapters may be in one batch; none is loaded at run time.

        The layers are named because vLLM 0.32 would otherwise prepare every linear layer, the output head among them:
        on a CPU that ends the engine when it is asked for the log-probabilities of several prompts. There it also adds
        what is in the last slot to requests for the model itself that share a batch with an adapter's
        (vllm-project/vllm#48421), so that one slot more than there are adapters stays empty.
        """
        rank = max(adapter.rank for adapter in self.adapters.values())
        slots = len(self.adapters) + (profile.minimum_driver is None)
        yield from ("--enable-lora", "--max-loras", str(slots))
        yield from ("--max-lora-rank", str(next(room for room in _RANKS if rank <= room)))
        modules = sorted({module for adapter in self.adapters.values() for module in adapter.modules})
        yield from ("--lora-target-modules", *modules)
        yield from ("--lora-modules", *(f"{name}={ADAPTERS}/{name}" for name in self.adapters))

    def record(self, command: tuple[str, ...]) -> ServedConfiguration:
        """The same for a manifest, of a resolved configuration, with the ``command`` that an image is started with."""
        return ServedConfiguration(
            variant=self.variant,
            context=self.context,
            dtype=self.dtype,
            kv_cache=self.kv_cache,
            tensor_parallel=self.tensor_parallel or 1,
            pipeline_parallel=self.pipeline_parallel,
            chat_template=self.chat_template,
            adapters=tuple(self.adapters),
            command=command,
        )

    def document(self) -> str:
        """The configuration as canonical JSON, for a label and a cache key."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


DEFAULT = ServingConfiguration()
"""How a model is served whose file says nothing about it."""


def changes_fp16(key: str) -> bool:
    """Whether FP16's answers depend on a key of ``serve``."""
    return key not in {*_SPEED_AND_MEMORY, *_AS_FP16, "variants"}


def default_context(config: Mapping[str, Any]) -> int | None:
    """The context that is served of a model with this ``config.json`` by default; None where the engine decides."""
    longest = config.get("max_position_embeddings", config.get("text_config", {}).get("max_position_embeddings"))
    return min(int(longest), LONGEST_CONTEXT) if longest else None


def default_dtype(config: Mapping[str, Any], profile: RuntimeProfile) -> Dtype:
    """The precision that a model was trained in, if the device supports it.

    A CPU emulates half precision: bfloat16 takes a fifth of the time. GPUs before Ampere have no bfloat16. Nothing is
    served in float32 unless the model file says so.
    """
    if profile.minimum_driver is None:
        return "bfloat16"
    parts = (config, config.get("text_config", {}))
    trained = next((part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), "float16")
    supported = all(gpu.capability >= _BFLOAT16_SINCE for gpu in gpus()[:1])
    return "bfloat16" if trained == "bfloat16" and supported else "float16"
