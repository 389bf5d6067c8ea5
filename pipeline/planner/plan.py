"""A plan: the memory of each scheme of a model, the GPUs that hold it, and upper bounds of their speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from containers.hardware.cpu import INSTRUCTION_SETS
from containers.hardware.gpu_models import GpuModel, price_source
from pipeline.compatibility.scheme import PublishedScheme
from pipeline.planner.document import (
    BytesPerGpu,
    MeasuredRelease,
    PlanDocument,
    PlannedEvaluation,
    PlannedPlacement,
    PlannedScheme,
    PlannedWorkload,
    SpeedBounds,
)
from pipeline.planner.facts import ModelFacts
from pipeline.planner.memory import (
    Demand,
    Drafting,
    Workload,
    cache_bytes,
    longest_context,
    most_requests,
    smallest_fit,
    usable_bytes,
)
from pipeline.planner.speed import Roofline, roofline
from pipeline.planner.weights import FP16, Weights

# What a scheme's checkpoint takes on disk: as an artifact, in its image, and in the registry.
_COPIES = 3
# A draft model is an artifact that all schemes share.
_COPIES_OF_DRAFT_MODEL = 2


@dataclass(frozen=True)
class Placement:
    """One scheme on one kind of GPU: the smallest group that holds it, or the largest there is, which doesn't.

    ``cache_bytes`` is what a replica has for its KV cache; ``longest_context`` is the longest context of which that
    holds the workload's requests, None if it holds none.
    """

    gpu: GpuModel
    fits: bool
    demand: Demand
    usable_bytes: int
    cache_bytes: int
    most_requests: int
    longest_context: int | None
    speed: Roofline

    @property
    def dollars_per_million_at_least(self) -> float | None:
        """Dollars for a million output tokens at the roofline, always busy: no server is so cheap."""
        hourly = self.dollars_per_hour
        return None if hourly is None else 1e6 * hourly / (3600 * self.speed.all_requests)

    @property
    def dollars_per_hour(self) -> float | None:
        """What the group costs to rent; None where the data file has no price."""
        return None if self.gpu.price is None else self.gpu.price.dollars_per_hour * self.demand.gpus

    def document(self) -> PlannedPlacement:
        """As JSON."""
        price, needed = self.gpu.price, self.demand
        return PlannedPlacement(
            gpu=self.gpu.name,
            gpus=needed.gpus,
            tensor_parallel=needed.tensor_parallel,
            pipeline_parallel=needed.pipeline_parallel,
            fits=self.fits,
            bytes_per_gpu=BytesPerGpu(
                weights=needed.weights,
                kv_cache=needed.kv_cache,
                activations=needed.activations,
                context=needed.context,
                total=needed.total,
                usable=self.usable_bytes,
            ),
            cache_bytes=self.cache_bytes,
            most_requests=self.most_requests,
            longest_context=self.longest_context,
            tokens_per_second_at_most=SpeedBounds(**asdict(self.speed)),
            dollars_per_hour=self.dollars_per_hour,
            dollars_per_million_tokens_at_least=self.dollars_per_million_at_least,
            price_source=None if price is None else price_source(price),
        )


@dataclass(frozen=True)
class SchemePlan:
    """One scheme: its weights, how it is served, and where it goes."""

    weights: Weights
    workload: Workload
    placements: Sequence[Placement]

    def document(self) -> PlannedScheme:
        """As JSON."""
        return PlannedScheme(
            scheme=self.weights.scheme,
            weights_bytes=self.weights.bytes,
            weights_bytes_on_cpu={name: self.weights.on_cpu(name) for name in INSTRUCTION_SETS if name != "none"},
            bits_per_weight=self.weights.bits_per_weight,
            parameters=self.weights.numbers,
            workload=PlannedWorkload.model_validate(asdict(self.workload)),
            gpus=tuple(placement.document() for placement in self.placements),
        )


@dataclass(frozen=True)
class Plan:
    """A model's plan. ``download_bytes`` is what is pulled, ``disk_bytes`` what its releases take here.

    ``refused`` has the schemes that can't be made of this model or served as its file says, with the reasons.
    """

    model: str
    facts: ModelFacts
    workload: Workload
    schemes: Sequence[SchemePlan]
    download_bytes: int
    disk_bytes: int
    notes: Sequence[str] = field(default_factory=tuple)
    refused: Mapping[str, Sequence[str]] = field(default_factory=dict)
    published: PublishedScheme | None = None
    """What `method: as-is` takes."""

    def document(
        self, measured: MeasuredRelease | None = None, evaluation: PlannedEvaluation | None = None
    ) -> PlanDocument:
        """As JSON, with what a release's load test measured and how the model is evaluated."""
        work = self.workload
        return PlanDocument(
            model=self.model,
            architecture=self.facts.architecture,
            attention=self.facts.attention,
            layers=len(self.facts.layers),
            longest_context=self.facts.context,
            workload=PlannedWorkload.model_validate(asdict(work)),
            kv_bytes_per_token=self.facts.kv_bytes_per_token(work.kv_number_bytes),
            kv_bytes_per_request=self.facts.kv_bytes(work.context, work.kv_number_bytes),
            download_bytes=self.download_bytes,
            disk_bytes=self.disk_bytes,
            schemes=tuple(scheme.document() for scheme in self.schemes),
            refused={name: tuple(problems) for name, problems in self.refused.items()},
            notes=tuple(self.notes),
            measured=measured,
            evaluation=evaluation,
        )


def make_plan(
    model: str,
    facts: ModelFacts,
    weights: Sequence[Weights],
    gpus: Sequence[GpuModel],
    workload: Workload,
    *,
    download_bytes: int,
    merges: bool = False,
    drafting: Drafting | None = None,
    refused: Mapping[str, Sequence[str]] | None = None,
    own: Mapping[str, Workload] | None = None,
) -> Plan:
    """Plan every scheme on every GPU without reading files or using the network; ``own`` are schemes' own workloads.

    Where the model ``merges`` an adapter, its source is kept twice: as it was pulled, and merged. ``drafting`` is of
    the draft model in the images, whether or not the workloads use it.
    """
    packed = [each for each in weights if each.scheme != FP16]
    source, drafts = download_bytes * (1 + merges), 0 if drafting is None else drafting.download_bytes
    made = sum(_COPIES * each.bytes + _COPIES_OF_DRAFT_MODEL * drafts for each in packed)
    schemes = []
    for each in weights:
        asked = (own or {}).get(each.scheme, workload)
        schemes.append(SchemePlan(each, asked, [place(facts, each, gpu, asked) for gpu in gpus]))
    return Plan(
        model=model,
        facts=facts,
        workload=workload,
        schemes=schemes,
        download_bytes=download_bytes + drafts,
        disk_bytes=source + drafts + made,
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
        cache_bytes=cache_bytes(needed, gpu, workload),
        most_requests=most_requests(facts, needed, gpu, workload),
        longest_context=longest_context(facts, needed, gpu, workload),
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
    if workload.drafting is not None:
        drafted = workload.drafting
        notes.append(
            f"the draft model's {drafted.weights_bytes / 1e6:,.1f} MB of weights and {drafted.cache_bytes_per_token:,} "
            "bytes of cache a token are counted; the speeds are without it"
        )
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
