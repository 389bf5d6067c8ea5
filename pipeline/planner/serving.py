"""How a model file's ``serve`` section enters a plan, and what of it the model itself does not allow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from containers.image.serving import ServingConfiguration, default_context
from pipeline.compatibility.description import ModelDescription
from pipeline.planner.facts import ModelFacts
from pipeline.planner.memory import Workload, indivisible
from pipeline.planner.plan import Plan
from pipeline.planner.weights import FP16, Weights
from pipeline.spec import ModelSpec


def workload_of(serving: ServingConfiguration, usual: Workload) -> Workload:
    """Return a workload as the file says it; what it leaves out stays as ``usual``, whose drafting is the file's."""
    return replace(
        usual,
        context=serving.context or usual.context,
        kv_number_bytes=serving.cache_bytes,
        headroom=usual.headroom if serving.gpu_memory is None else 1 - serving.gpu_memory,
        tensor_parallel=serving.tensor_parallel,
        pipeline_parallel=serving.pipeline_parallel,
        batched_tokens=serving.batched_tokens,
        max_sequences=serving.max_sequences,
        drafting=usual.drafting if serving.drafts else None,
    )


def tested_workload(serving: ServingConfiguration, model: ModelDescription, usual: Workload, free: float) -> Workload:
    """Return what a server must hold to be tested at all: one request of the context that is served.

    ``free`` is the share of a GPU that the engine leaves free by itself.
    """
    context = serving.context or default_context(model.config) or usual.context
    stated = workload_of(serving, replace(usual, context=context, concurrency=1, headroom=free))
    return replace(stated, tensor_parallel=serving.tensor_parallel or 1)


def problems(spec: ModelSpec, facts: ModelFacts, weights: Sequence[Weights]) -> list[str]:
    """Say which keys of the section the model does not allow, each with its path; ``weights`` are of its schemes."""
    by_scheme = {each.scheme: each for each in weights}
    found = [
        f"`{_place(spec, key, scheme, variant)}`: {problem}"
        for scheme, variant in _configurations(spec, by_scheme)
        for key, problem in _refused(spec.serving(scheme, variant), facts, by_scheme[scheme or FP16])
    ]
    return list(dict.fromkeys(found))


def unfitting(spec: ModelSpec, planned: Plan) -> dict[str, list[str]]:
    """Say which schemes no GPU of a plan holds as the file says it, by their names."""
    found = {}
    for scheme in planned.schemes:
        name = scheme.weights.scheme
        stated = [
            f"`{_place(spec, key, name)}` {getattr(spec.serving(name), key):,}"
            for key in ("context", "tensor_parallel")
            if name != FP16 and getattr(spec.serving(name), key) is not None
        ]
        if stated and scheme.placements and not any(placement.fits for placement in scheme.placements):
            best = max(scheme.placements, key=lambda placement: placement.usable_bytes - placement.demand.total)
            needed, usable = best.demand.total / 2**30, best.usable_bytes / 2**30
            asked = f"{scheme.workload.concurrency} concurrent requests need {needed:.1f} GiB"
            where = f"each of {best.demand.gpus} {best.gpu.name}, of which {usable:.1f} GiB are usable"
            found[name] = [f"{' and '.join(stated)}: {asked} on {where}"]
    return found


def _configurations(spec: ModelSpec, schemes: Mapping[str, Weights]) -> Iterator[tuple[str | None, str | None]]:
    """Yield each scheme and variant that is served; no scheme is FP16, which all are compared with."""
    for scheme in schemes:
        yield None if scheme == FP16 else scheme, None
    for variant in spec.serve.variants:
        for scheme in schemes:
            if scheme != FP16:
                yield scheme, variant


def _refused(serving: ServingConfiguration, facts: ModelFacts, weights: Weights) -> Iterator[tuple[str, str]]:
    if serving.context is not None and serving.context > facts.context:
        yield "context", f"the model's longest context is {facts.context:,} tokens (found {serving.context:,})"
    if serving.tensor_parallel is not None:
        reason = indivisible(facts, weights, serving.tensor_parallel)
        if reason is not None:
            yield "tensor_parallel", reason
    if serving.pipeline_parallel > len(facts.layers):
        yield "pipeline_parallel", f"the model has {len(facts.layers)} layers (found {serving.pipeline_parallel})"


def _place(spec: ModelSpec, key: str, scheme: str | None, variant: str | None = None) -> str:
    """The path of the key that holds for a scheme and a variant: the last section that sets it."""
    if variant is not None and key in spec.serve.variants[variant].model_fields_set:
        return f"serve.variants.{variant}.{key}"
    if scheme is not None and scheme in spec.schemes and key in spec.schemes[scheme].serve.model_fields_set:
        return f"schemes.{scheme}.serve.{key}"
    return f"serve.{key}"
