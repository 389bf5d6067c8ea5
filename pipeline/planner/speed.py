"""A roofline: an upper bound of a GPU's speed (Williams et al., CACM 52(4), 2009).

A decoding step reads the weights once for all requests and each request's cache, and does two operations a weight and
request: it takes at least as long as the slower of the two. What is left out (launches, communication between GPUs,
kernels below the peak) makes every server slower than this bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from containers.hardware.gpu_models import GpuModel
from pipeline.planner.facts import ModelFacts
from pipeline.planner.memory import Workload
from pipeline.planner.weights import Weights, active_numbers, bytes_per_step


@dataclass(frozen=True)
class Roofline:
    """Tokens a second at most: of one request alone, of all together, and of prompts; and what bounds the second."""

    one_request: float
    all_requests: float
    prompt: float
    bound: str


def roofline(facts: ModelFacts, weights: Weights, gpu: GpuModel, workload: Workload, tensor_parallel: int) -> Roofline:
    """Bound the speed of a group of GPUs at half of the workload's context, which an answer has on average."""
    gpus = tensor_parallel * workload.pipeline_parallel
    bandwidth, flops = gpu.bandwidth_bytes_per_s * gpus, _flops(gpu, weights) * gpus
    cached = facts.kv_bytes(max(1, workload.context // 2), workload.kv_number_bytes, tensor_parallel) * tensor_parallel
    active = active_numbers(weights, facts)

    def seconds(requests: int) -> tuple[float, float]:
        read = bytes_per_step(weights, facts, requests) + requests * cached
        return read / bandwidth, 2 * active * requests / flops

    reading, computing = seconds(workload.concurrency)
    return Roofline(
        one_request=1 / max(seconds(1)),
        all_requests=workload.concurrency / max(reading, computing),
        prompt=flops / (2 * active) if active else 0.0,
        bound="memory bandwidth" if reading >= computing else "arithmetic",
    )


def _flops(gpu: GpuModel, weights: Weights) -> float:
    """Packed weights are multiplied at 16 bits; what is stored in 8 (FP8) uses the 8-bit units where there are any."""
    stored_in_8 = not weights.quantized and weights.bytes < 1.5 * weights.numbers
    return gpu.flops.get("fp8", gpu.flops["fp16"]) if stored_in_8 else gpu.flops["fp16"]
