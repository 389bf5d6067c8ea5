"""A plan: the memory of each scheme of a model, the GPUs that hold it, and upper bounds of their speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from containers.hardware.cpu import INSTRUCTION_SETS
from containers.hardware.gpu_models import GpuModel, price_source
from pipeline.planner.facts import ModelFacts
from pipeline.planner.memory import Demand, Workload, most_requests, smallest_fit, usable_bytes
from pipeline.planner.speed import Roofline, roofline
from pipeline.planner.weights import FP16, Weights

SCHEMA = "slipway/plan/1"
# What a scheme's checkpoint takes on disk: as an artifact, in its image, and in the registry.
_COPIES = 3


@dataclass(frozen=True)
class Placement:
    """One scheme on one kind of GPU: the smallest group that holds it, or the largest there is, which doesn't."""

    gpu: GpuModel
    fits: bool
    demand: Demand
    usable_bytes: int
    most_requests: int
    speed: Roofline

    @property
    def dollars_per_million_at_least(self) -> float | None:
        """Dollars for a million output tokens at the roofline, always busy: no server is so cheap."""
        hourly = self.dollars_per_hour
        return None if hourly is None else 1e6 * hourly / (3600 * self.speed.all_requests)

    @property
    def dollars_per_hour(self) -> float | None:
        """What the group costs to rent; None where the data file has no price."""
        return None if self.gpu.price is None else self.gpu.price.dollars_per_hour * self.demand.tensor_parallel

    def document(self) -> dict[str, Any]:
        """As JSON."""
        price = self.gpu.price
        return {
            "gpu": self.gpu.name,
            "gpus": self.demand.tensor_parallel,
            "fits": self.fits,
            "bytes_per_gpu": {**asdict(self.demand), "total": self.demand.total, "usable": self.usable_bytes},
            "most_requests": self.most_requests,
            "tokens_per_second_at_most": asdict(self.speed),
            "dollars_per_hour": self.dollars_per_hour,
            "dollars_per_million_tokens_at_least": self.dollars_per_million_at_least,
            "price_source": None if price is None else price_source(price),
        }


@dataclass(frozen=True)
class SchemePlan:
    """One scheme: its weights, and where they go."""

    weights: Weights
    placements: Sequence[Placement]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "scheme": self.weights.scheme,
            "weights_bytes": self.weights.bytes,
            "weights_bytes_on_cpu": {name: self.weights.on_cpu(name) for name in INSTRUCTION_SETS if name != "none"},
            "bits_per_weight": self.weights.bits_per_weight,
            "parameters": self.weights.numbers,
            "gpus": [placement.document() for placement in self.placements],
        }


@dataclass(frozen=True)
class Plan:
    """A model's plan. ``download_bytes`` is what is pulled, ``disk_bytes`` what its releases take here.

    ``refused`` has the schemes that can't be made of this model, with the reasons.
    """

    model: str
    facts: ModelFacts
    workload: Workload
    schemes: Sequence[SchemePlan]
    download_bytes: int
    disk_bytes: int
    notes: Sequence[str] = field(default_factory=tuple)
    refused: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "architecture": self.facts.architecture,
            "attention": self.facts.attention,
            "layers": len(self.facts.layers),
            "longest_context": self.facts.context,
            "workload": asdict(self.workload),
            "kv_bytes_per_token": self.facts.kv_bytes_per_token(self.workload.kv_number_bytes),
            "kv_bytes_per_request": self.facts.kv_bytes(self.workload.context, self.workload.kv_number_bytes),
            "download_bytes": self.download_bytes,
            "disk_bytes": self.disk_bytes,
            "schemes": [scheme.document() for scheme in self.schemes],
            "refused": {name: list(problems) for name, problems in self.refused.items()},
            "notes": list(self.notes),
        }


def make_plan(
    model: str,
    facts: ModelFacts,
    weights: Sequence[Weights],
    gpus: Sequence[GpuModel],
    workload: Workload,
    *,
    download_bytes: int,
    refused: Mapping[str, Sequence[str]] | None = None,
) -> Plan:
    """Plan every scheme on every GPU, without reading files or using the network."""
    packed = [each for each in weights if each.scheme != FP16]
    return Plan(
        model=model,
        facts=facts,
        workload=workload,
        schemes=[SchemePlan(each, [place(facts, each, gpu, workload) for gpu in gpus]) for each in weights],
        download_bytes=download_bytes,
        disk_bytes=download_bytes + _COPIES * sum(each.bytes for each in packed),
        notes=list(_notes(facts, weights, workload)),
        refused=refused or {},
    )


def place(facts: ModelFacts, weights: Weights, gpu: GpuModel, workload: Workload) -> Placement:
    """Find the smallest group of a kind of GPU that holds the model under the workload."""
    needed, fits = smallest_fit(facts, weights, gpu, workload)
    return Placement(
        gpu=gpu,
        fits=fits,
        demand=needed,
        usable_bytes=usable_bytes(gpu, workload),
        most_requests=most_requests(facts, needed, gpu, workload),
        speed=roofline(facts, weights, gpu, workload, needed.tensor_parallel),
    )


def _as_it_is(weights: Weights) -> str:
    """Describe the sizes of the weights, scales and unquantized parts."""
    bare = weights.quantized * weights.bits / 8
    parts = (bare, weights.packed - bare, weights.bytes - weights.packed)
    packed, beside, rest = (f"{part / 1e9:,.3g} GB" for part in parts)
    return (
        f"{weights.scheme}: {packed} of {weights.bits}-bit weights, {beside} of scales and zeros, {rest} that stays at "
        f"16 bits; {weights.bits_per_weight:.2f} bits per quantized weight, "
        f"{8 * weights.bytes / weights.numbers:.2f} over all"
    )


def _notes(facts: ModelFacts, weights: Sequence[Weights], workload: Workload) -> list[str]:
    by_name: Mapping[str, Weights] = {each.scheme: each for each in weights}
    notes = [_as_it_is(each) for each in by_name.values() if each.quantized]
    if workload.context > facts.context:
        notes.append(f"the context of {workload.context:,} tokens is longer than the model's own, {facts.context:,}")
    if facts.latent:
        notes.append("the latent cache is whole on every GPU: tensor parallelism divides the weights, not the cache")
    if facts.experts:
        notes.append(
            f"{facts.experts_per_token} of {facts.experts} experts answer for a token: memory holds all of them, speed "
            "follows those in use"
        )
    notes.append(
        "vLLM takes its share of the memory up front (0.92 of each GPU by default) and gives what is left to the KV "
        "cache; speeds are bounds that no server reaches"
    )
    return notes
