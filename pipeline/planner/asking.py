"""What may be planned for: a model's file, a hub's model, or a release, with what its load test measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from containers.hardware.gpu_models import GpuModel
from evals.load.evidence import parse_load_evidence
from pipeline.compatibility import preflight
from pipeline.compatibility.backends import METHODS
from pipeline.compatibility.description import ModelDescription
from pipeline.compatibility.scheme import Scheme
from pipeline.errors import PlanError, UnsupportedModelError
from pipeline.planner import draft_model, serving
from pipeline.planner.document import MeasuredRelease
from pipeline.planner.evaluation import check_images
from pipeline.planner.facts import ModelFacts, read_facts
from pipeline.planner.memory import Drafting, Workload
from pipeline.planner.plan import Plan, make_plan
from pipeline.planner.sources import Described, describe, describe_folder, with_published
from pipeline.planner.weights import Weights, quantized, taken, unquantized
from pipeline.quantization import mixture
from pipeline.settings import Settings
from pipeline.sources import source as sources
from pipeline.sources.origin import Access
from pipeline.spec import ModelSpec, Source
from pipeline.trust import trust_of
from registry.manifest import EVIDENCE, Manifest
from registry.pull import ReleaseMetadata, read_metadata

# From the usual workload to the one that is asked for.
Choose = Callable[[Workload], Workload]
LOAD = f"{EVIDENCE}/load.json"
IMAGE = f"{EVIDENCE}/image.json"
# A context that fits most models and uses, where none is named.
USUAL_CONTEXT = 4096


def plan_source(
    spec: ModelSpec | str,
    settings: Settings,
    gpus: Sequence[GpuModel],
    workload: Choose = lambda usual: usual,
) -> Plan:
    """Plan a model's file, or a source's URI with the usual schemes; those that can't be made are in ``refused``.

    Raises:
        SourceError: the source can't be reached or is refused.
        PlanError: its configuration or headers can't be read.
        UnsupportedModelError: it can't be planned for, and a scheme of it can't be made; or it can't be served as the
            file says.
    """
    described = describe_source(spec, settings)
    schemes = usual_schemes(described.model) if isinstance(spec, str) else spec.schemes
    refused = refusals(described.model, schemes)
    try:
        drafting = None if isinstance(spec, str) else drafting_of(spec, described.model, settings)
        planned = plan_described(spec, described, schemes, gpus, workload, refused, drafting)
    except UnsupportedModelError:
        raise
    except PlanError as error:
        if not refused:
            raise
        raise UnsupportedModelError("; ".join([*sentences(refused), str(error)])) from error
    if isinstance(spec, str):
        return planned
    return replace(planned, refused={**planned.refused, **serving.unfitting(spec, planned)})


def plan_described(
    spec: ModelSpec | str,
    described: Described,
    schemes: Mapping[str, Scheme],
    gpus: Sequence[GpuModel],
    workload: Choose,
    refused: Mapping[str, Sequence[str]],
    drafting: Drafting | None = None,
) -> Plan:
    """Plan a model that has been described, in its ``schemes`` but those ``refused``, each as its file has it served.

    Raises:
        PlanError: its configuration can't be read.
        UnsupportedModelError: the model does not allow what its file says of serving it.
    """
    if not isinstance(spec, str):
        check_images(spec, described.model)
    facts = read_facts(described.model.config)
    weights = weights_of(described, {name: scheme for name, scheme in schemes.items() if name not in refused})
    usual = replace(usual_workload(facts), drafting=drafting)
    if isinstance(spec, str):
        wanted = workload(usual)
        return make_plan(spec, facts, weights, gpus, wanted, download_bytes=described.bytes, refused=refused)
    if wrong := serving.problems(spec, facts, weights):
        raise UnsupportedModelError("; ".join(wrong))
    own = {
        scheme: workload(serving.workload_of(spec.serving(scheme if scheme in spec.schemes else None), usual))
        for scheme in (each.scheme for each in weights)
    }
    planned = make_plan(
        spec.model,
        facts,
        weights,
        gpus,
        next(iter(own.values())),
        download_bytes=described.bytes,
        merges=spec.source.adapter is not None,
        drafting=drafting,
        refused=refused,
        own=own,
    )
    return replace(planned, published=None if described.published is None else described.published.scheme)


def weights_of(described: Described, schemes: Mapping[str, Scheme]) -> list[Weights]:
    """The weights at 16 bits, where there are any, and in each scheme."""
    found = described.published
    at_16_bits = [unquantized(described.model)] if described.is_compared else []
    if found is not None:
        return [*at_16_bits, *(taken(name, found) for name in schemes)]
    return [*at_16_bits, *(quantized(name, scheme, described.model) for name, scheme in schemes.items())]


def drafting_of(spec: ModelSpec, model: ModelDescription, settings: Settings) -> Drafting | None:
    """What the model takes that drafts tokens for this one; None where no model does.

    Raises:
        SourceError: it can't be reached, is refused, or can't draft tokens for the model.
    """
    resolved = draft_model.resolve(spec, settings)
    return None if resolved is None else draft_model.check(spec, resolved, model)


def describe_source(spec: ModelSpec | str, settings: Settings, pulled: Path | None = None) -> Described:
    """Read a source's configuration and headers; where it is ``pulled`` already, from that folder.

    Raises:
        SourceError: the source can't be reached or is refused.
        PlanError: its configuration or headers can't be read.
    """
    return describe_folder(pulled) if pulled is not None else _described(spec, settings)


def refusals(model: ModelDescription, schemes: Mapping[str, Scheme], *, has_gpus: bool = True) -> dict[str, list[str]]:
    """Why schemes can't be made of a model, by their names; those that can be made are left out.

    ``has_gpus`` is whether quantizers have a GPU.
    """
    found = {
        name: preflight.find_problems(model, scheme, has_gpus=has_gpus) or mixture.find_problems(model, scheme)
        for name, scheme in schemes.items()
    }
    return {name: problems for name, problems in found.items() if problems}


def sentences(refused: Mapping[str, Sequence[str]]) -> list[str]:
    """The refusals in words, one for each problem."""
    return [f"`schemes.{name}`: {problem}" for name, problems in refused.items() for problem in problems]


def usual_schemes(model: ModelDescription) -> dict[str, Scheme]:
    """What most checkpoints on the hubs are, each by the first backend that can make it of this model.

    If nothing can be made of it, the first backend of each method, so that its reasons can be said.
    """
    schemes = {
        method: [Scheme.model_validate({"method": method, "backend": backend}) for backend in backends]
        for method, backends in METHODS.items()
    }
    able = {
        method: [scheme for scheme in choices if not preflight.find_problems(model, scheme)]
        for method, choices in schemes.items()
    }
    return {method: found[0] for method, found in (able if any(able.values()) else schemes).items() if found}


def plan_release(found: ReleaseMetadata, gpus: Sequence[GpuModel], workload: Choose = lambda usual: usual) -> Plan:
    """Plan a release from its signed manifest: the checkpoint's own bytes, the source's numbers, its configuration.

    Raises:
        PlanError: its configuration can't be read.
    """
    manifest = found.manifest
    facts = read_facts(_json(found, "config.json"))
    return make_plan(
        manifest.name,
        facts,
        [_released_weights(manifest, facts)],
        gpus,
        workload(usual_workload(facts)),
        download_bytes=manifest.size_bytes,
    )


def look(reference: str, settings: Settings) -> ReleaseMetadata:
    """Read what a plan needs of the release ``NAME[@ALIAS]``.

    Raises:
        RegistryError: there is no such release, or it does not match its signature.
    """
    return read_metadata(
        reference,
        ("config.json", LOAD, IMAGE),
        tracking_uri=settings.tracking_uri,
        trusted_keys=trust_of(settings),
    )


def measured(found: ReleaseMetadata) -> MeasuredRelease | None:
    """What the release's load test measured of what a plan predicts; None where it has no such evidence.

    Raises:
        LoadEvidenceError: its evidence can't be read.
    """
    if LOAD not in found.files:
        return None
    load = parse_load_evidence(found.files[LOAD], f"{LOAD} of {found.manifest.name}")
    tokens = None if load.capacity is None else load.capacity.output_tokens_per_second
    requests = None if load.capacity is None else load.capacity.requests_per_second
    return MeasuredRelease(
        peak_memory_bytes=load.metrics.get("peak_memory_bytes"),
        peak=load.memory.peak,
        expected=load.memory.expected,
        output_tokens_per_second=tokens or load.metrics.get("output_tokens_per_second"),
        requests_per_second=requests or load.metrics.get("requests_per_second"),
        at_capacity=bool(tokens),
    )


def usual_workload(facts: ModelFacts) -> Workload:
    """Sixteen requests at once, of 4,096 tokens or the model's longest context."""
    return Workload(context=min(USUAL_CONTEXT, facts.context), concurrency=16)


def _described(spec: ModelSpec | str, settings: Settings) -> Described:
    if isinstance(spec, str):
        return describe(sources.resolve(spec, None, access=Access.of(settings)))
    original = _of_source(spec.original, spec.original_lock, settings)
    if not spec.is_published:
        return original
    if spec.baseline is None:
        return with_published(original, None)
    return with_published(_of_source(spec.source, spec.lock, settings), original)


def _of_source(source: Source, lock: Path, settings: Settings) -> Described:
    return describe(sources.resolve_locked(source.uri, source.revision, lock, settings))


def _released_weights(manifest: Manifest, facts: ModelFacts) -> Weights:
    """The checkpoint's own bytes; the number of parameters follows from the source's bytes, at two per parameter."""
    size = sum(file.size for name, file in manifest.files.items() if name.endswith(".safetensors"))
    numbers = sum(file.size for name, file in manifest.source.files.items() if name.endswith(".safetensors")) // 2
    kept = facts.embedding * (1 if facts.tied else 2)
    parameters = manifest.quantizer.parameters
    bits, group = parameters.get("bits"), parameters.get("group_size")
    return Weights(
        scheme=manifest.scheme,
        bytes=size,
        packed=max(0, size - 2 * kept),
        numbers=numbers,
        quantized=max(0, numbers - kept),
        bits=int(bits) if isinstance(bits, int) else 4,
        group_size=int(group) if isinstance(group, int) else None,
        linear=max(0, numbers - kept),
        head=facts.embedding,
    )


def _json(found: ReleaseMetadata, name: str) -> dict[str, Any]:
    try:
        document = json.loads(found.files[name])
    except (KeyError, ValueError) as error:
        raise PlanError(f"{found.manifest.name} has no readable {name}: {error!r}") from error
    if not isinstance(document, dict):
        raise PlanError(f"{name} of {found.manifest.name} is not a JSON object")
    return document
