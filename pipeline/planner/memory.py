"""The memory that a server needs on each GPU, and which GPUs it fits.

    weights / t  +  KV cache  +  activations  +  context        held against        (1 - headroom) * the GPU's memory

`t` is the tensor-parallel size. Parts that are estimates, with their origin:

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
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Demand:
    """Bytes on each GPU of a group of ``tensor_parallel``."""

    tensor_parallel: int
    weights: int
    kv_cache: int
    activations: int
    context: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.kv_cache + self.activations + self.context


@dataclass(frozen=True)
class Workload:
    """What is served: ``concurrency`` requests at once of ``context`` tokens each, prompt and answer together.

    ``kv_number_bytes`` is 2 for a cache at 16 bits, 1 for FP8. ``headroom`` is the share of a GPU that stays free.
    """

    context: int
    concurrency: int
    kv_number_bytes: int = 2
    headroom: float = 0.2


def batch(gpu: GpuModel) -> tuple[int, int]:
    """Tokens that vLLM computes in one step by default, and sequences that it runs at once."""
    memory = 0 if gpu.name.startswith("A100") else gpu.memory_bytes
    return next((tokens, requests) for least, tokens, requests in _BATCHES if memory >= least)


def activation_bytes(facts: ModelFacts, tokens: int, requests: int, tensor_parallel: int) -> int:
    """Bytes that the largest step takes on each GPU beside weights and cache; see the module's head."""
    feed_forward = 3 * facts.intermediate / tensor_parallel
    attention = (2 * facts.heads + 2 * facts.kv_heads) * facts.head_dim / tensor_parallel
    step = 2 * tokens * (2 * facts.hidden + max(feed_forward, attention))
    return int(step + 3 * 4 * requests * facts.vocabulary)


def demand(facts: ModelFacts, weights: Weights, gpu: GpuModel, workload: Workload, tensor_parallel: int) -> Demand:
    """What each GPU of a group must hold."""
    tokens, requests = batch(gpu)
    kept = facts.kv_bytes(workload.context, workload.kv_number_bytes, tensor_parallel, tokens)
    several = NCCL_BYTES if tensor_parallel > 1 else 0
    return Demand(
        tensor_parallel=tensor_parallel,
        weights=math.ceil(weights.bytes / tensor_parallel),
        kv_cache=workload.concurrency * kept,
        activations=activation_bytes(facts, tokens, requests, tensor_parallel),
        context=CONTEXT_BYTES + GRAPHS_BYTES + several,
    )


def usable_bytes(gpu: GpuModel, workload: Workload) -> int:
    """Bytes of a GPU that may be used, its headroom left free."""
    return int((1 - workload.headroom) * gpu.memory_bytes)


def most_requests(facts: ModelFacts, needed: Demand, gpu: GpuModel, workload: Workload) -> int:
    """How many requests of the workload's context the cache holds, where it takes all that the rest leaves."""
    room = usable_bytes(gpu, workload) - needed.total + needed.kv_cache
    one = facts.kv_bytes(workload.context, workload.kv_number_bytes, needed.tensor_parallel, batch(gpu)[0])
    return max(0, room // one) if one else 0


def tensor_parallel_sizes(facts: ModelFacts, weights: Weights) -> Iterator[int]:
    """Yield the group sizes, ascending, that a model can be divided into.

    Attention heads are divided evenly, key-value heads divided or copied evenly, the feed-forward's width divided; and
    in a quantized layer whose inputs are divided no group of weights is cut: 29,568 inputs in groups of 128 are 231
    groups, which no even number divides.
    """
    group = weights.group_size if weights.group_size and weights.group_size > 0 else 1
    for size in range(1, LARGEST + 1):
        heads = facts.heads % size == 0
        shared = facts.latent or facts.kv_heads % size == 0 or size % facts.kv_heads == 0
        divided = (facts.intermediate, facts.heads * facts.head_dim)
        if heads and shared and all(width % (size * group) == 0 for width in divided):
            yield size


def smallest_fit(facts: ModelFacts, weights: Weights, gpu: GpuModel, workload: Workload) -> tuple[Demand, bool]:
    """Return the demand on the smallest group of GPUs that fits, and True; or on the largest there is, and False."""
    needed = demand(facts, weights, gpu, workload, 1)
    for size in tensor_parallel_sizes(facts, weights):
        needed = demand(facts, weights, gpu, workload, size)
        if needed.total <= usable_bytes(gpu, workload):
            return needed, True
    return needed, False
