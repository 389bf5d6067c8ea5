"""The memory that a server needs on each GPU, and which GPUs it fits.

    weights / (t p)  +  KV cache / p  +  activations  +  context     held against     (1 - headroom) * the GPU's memory

`t` is the tensor-parallel size, by which the cache is divided as `facts` has it; `p` is the pipeline-parallel size, of
which the largest stage counts. Parts that are estimates, with their origin:

- Activations are those of the largest step: the residual stream, and the widest of attention's and the feed-forward's
  own tensors, for every batched token at 16 bits; then the logits of every sequence at 32 bits, three times (logits,
  probabilities, sorted). For Llama 3 8B at 8,192 tokens and 256 sequences that is 1.15 GiB; vLLM has long reported
  1.19 to 1.23 GiB of "PyTorch activation peak memory" there.
- The CUDA context and libraries take 0.5 GiB on current drivers; CUDA graphs and compiled code 0.4 GiB, as vLLM
  reports for models of a few billion weights. With several GPUs NCCL's buffers take 0.5 GiB on each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from containers.hardware.gpu_models import GpuModel
from pipeline.planner.facts import ModelFacts
from pipeline.planner.weights import Weights

GIB = 2**30
CONTEXT_BYTES = GIB // 2
GRAPHS_BYTES = int(0.4 * GIB)
NCCL_BYTES = GIB // 2
# vLLM's own defaults for an API server (0.32, `EngineArgs.get_batch_defaults`): from so much memory on, so many tokens
# a step and sequences at once. An A100 counts as small, whatever its memory.
_BATCHES = ((160 * GIB, 16384, 1024), (70 * GIB, 8192, 1024), (0, 2048, 256))
# Tensor parallelism beyond the GPUs of one machine is too slow to be useful.
LARGEST = 8
CONTEXT_STEP = 1024  # tokens; a proposed context is a multiple


@dataclass(frozen=True)
class Demand:
    """Bytes on each GPU of a replica of ``tensor_parallel`` times ``pipeline_parallel``."""

    tensor_parallel: int
    pipeline_parallel: int
    weights: int
    kv_cache: int
    activations: int
    context: int

    @property
    def gpus(self) -> int:
        """GPUs of the replica."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def total(self) -> int:
        """Bytes on each GPU."""
        return self.weights + self.kv_cache + self.activations + self.context


@dataclass(frozen=True)
class Drafting:
    """What a draft model takes beside the model: weights, and for each token of a request a cache, at 16 bits.

    ``download_bytes`` is the size of its files, which every image that has it takes once more.
    """

    weights_bytes: int
    cache_bytes_per_token: int
    download_bytes: int


@dataclass(frozen=True)
class Workload:
    """What is served: ``concurrency`` requests at once of ``context`` tokens each, prompt and answer together.

    ``kv_number_bytes`` is 2 for a cache at 16 bits, 1 for FP8. ``headroom`` is the share of a GPU that stays free.
    ``tensor_parallel`` is None where the smallest group that fits is to be found. ``batched_tokens`` and
    ``max_sequences`` are tokens of a step and sequences at once, None for vLLM's own. ``drafting`` is of the model that
    drafts tokens, which is divided among the GPUs like the model.
    """

    context: int
    concurrency: int
    kv_number_bytes: int = 2
    headroom: float = 0.2
    tensor_parallel: int | None = None
    pipeline_parallel: int = 1
    batched_tokens: int | None = None
    max_sequences: int | None = None
    drafting: Drafting | None = None


def batch(gpu: GpuModel, workload: Workload) -> tuple[int, int]:
    """Tokens that vLLM computes in one step, and sequences that it runs at once: the workload's, or its defaults."""
    memory = 0 if gpu.name.startswith("A100") else gpu.memory_bytes
    tokens, requests = next((tokens, requests) for least, tokens, requests in _BATCHES if memory >= least)
    return workload.batched_tokens or tokens, workload.max_sequences or requests


def activation_bytes(facts: ModelFacts, tokens: int, requests: int, tensor_parallel: int) -> int:
    """Bytes that the largest step takes on each GPU beside weights and cache; see the module's head."""
    feed_forward = 3 * facts.intermediate / tensor_parallel
    attention = (2 * facts.heads + 2 * facts.kv_heads) * facts.head_dim / tensor_parallel
    step = 2 * tokens * (2 * facts.hidden + max(feed_forward, attention))
    return int(step + 3 * 4 * requests * facts.vocabulary)


def demand(facts: ModelFacts, weights: Weights, gpu: GpuModel, workload: Workload, tensor_parallel: int) -> Demand:
    """What each GPU of a group must hold."""
    tokens, requests = batch(gpu, workload)
    several = NCCL_BYTES if tensor_parallel * workload.pipeline_parallel > 1 else 0
    return Demand(
        tensor_parallel=tensor_parallel,
        pipeline_parallel=workload.pipeline_parallel,
        weights=math.ceil(weights.bytes / tensor_parallel * _largest_stage(facts, workload))
        + (0 if workload.drafting is None else math.ceil(workload.drafting.weights_bytes / tensor_parallel)),
        kv_cache=workload.concurrency * _kept(facts, gpu, workload, tensor_parallel),
        activations=activation_bytes(facts, tokens, requests, tensor_parallel),
        context=CONTEXT_BYTES + GRAPHS_BYTES + several,
    )


def _largest_stage(facts: ModelFacts, workload: Workload) -> float:
    """The share of the layers that the largest stage of a pipeline has."""
    return math.ceil(len(facts.layers) / workload.pipeline_parallel) / len(facts.layers)


def _kept(facts: ModelFacts, gpu: GpuModel, workload: Workload, tensor_parallel: int) -> int:
    """Bytes that one request of the workload's context keeps on each GPU."""
    tokens, _ = batch(gpu, workload)
    whole = facts.kv_bytes(workload.context, workload.kv_number_bytes, tensor_parallel, tokens)
    return math.ceil(whole * _largest_stage(facts, workload)) + _drafted(workload, tensor_parallel)


def _drafted(workload: Workload, tensor_parallel: int) -> int:
    """Bytes that the draft model keeps for one request on each GPU."""
    if workload.drafting is None:
        return 0
    numbers = workload.context * workload.drafting.cache_bytes_per_token // 2
    return math.ceil(numbers * workload.kv_number_bytes / tensor_parallel)


def usable_bytes(gpu: GpuModel, workload: Workload) -> int:
    """Bytes of a GPU that may be used, its headroom left free."""
    return int((1 - workload.headroom) * gpu.memory_bytes)


def most_requests(facts: ModelFacts, needed: Demand, gpu: GpuModel, workload: Workload) -> int:
    """How many requests of the workload's context the cache holds, where it takes all that the rest leaves."""
    one = _kept(facts, gpu, workload, needed.tensor_parallel)
    return cache_bytes(needed, gpu, workload) // needed.gpus // one if one else 0


def cache_bytes(needed: Demand, gpu: GpuModel, workload: Workload) -> int:
    """Bytes that all GPUs of a replica have for the KV cache, beside what the rest takes."""
    return max(0, usable_bytes(gpu, workload) - needed.total + needed.kv_cache) * needed.gpus


def longest_context(facts: ModelFacts, needed: Demand, gpu: GpuModel, workload: Workload) -> int | None:
    """The longest context, in steps of `CONTEXT_STEP`, at which the cache holds the workload's requests; None for none.

    A context of the model's own length is the longest, whether it is a multiple or not.
    """

    def holds(context: int) -> bool:
        asked = replace(workload, context=context)
        return most_requests(facts, needed, gpu, asked) >= workload.concurrency

    if holds(facts.context):
        return facts.context
    low, high = 0, facts.context // CONTEXT_STEP + 1  # in steps: the cache grows with the context
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle * CONTEXT_STEP) else (low, middle)
    return low * CONTEXT_STEP or None


def tensor_parallel_sizes(facts: ModelFacts, weights: Weights) -> Iterator[int]:
    """Yield the group sizes, ascending, that a model can be divided into."""
    return (size for size in range(1, LARGEST + 1) if indivisible(facts, weights, size) is None)


def indivisible(facts: ModelFacts, weights: Weights, size: int) -> str | None:
    """Say why a model can't be divided among so many GPUs; None if it can.

    Attention heads are divided evenly, key-value heads divided or copied evenly, the feed-forward's width divided; and
    in a quantized layer whose inputs are divided no group of weights is cut: 29,568 inputs in groups of 128 are 231
    groups, which no even number divides. Where groups are squares, none is cut across its outputs either.
    """
    group = weights.group_size if weights.group_size and weights.group_size > 0 else 1
    if facts.heads % size:
        return f"{size} does not divide the model's {facts.heads} attention heads"
    if not facts.latent and facts.kv_heads % size and size % facts.kv_heads:
        return f"{size} neither divides the model's {facts.kv_heads} key-value heads nor is a multiple of them"
    for width in (facts.intermediate, facts.heads * facts.head_dim):
        if width % (size * group):
            groups = "" if group == 1 else f" in groups of {group} ({weights.scheme})"
            return f"{size} does not divide the {width:,} inputs of a layer{groups}"
    keys = facts.kv_heads * facts.head_dim // min(size, facts.kv_heads)
    if weights.squares and not facts.latent and keys % group:
        return (
            f"{size} leaves {keys} outputs of the keys' layer, which squares of {group} ({weights.scheme}) don't divide"
        )
    return None


def smallest_fit(facts: ModelFacts, weights: Weights, gpu: GpuModel, workload: Workload) -> tuple[Demand, bool]:
    """Return the demand on the smallest group of GPUs that fits, and True; or on the largest there is, and False.

    A workload that states its group has no other.
    """
    needed = demand(facts, weights, gpu, workload, workload.tensor_parallel or 1)
    stated = workload.tensor_parallel
    for size in tensor_parallel_sizes(facts, weights) if stated is None else (stated,):
        needed = demand(facts, weights, gpu, workload, size)
        if needed.total <= usable_bytes(gpu, workload):
            return needed, True
    return needed, False
