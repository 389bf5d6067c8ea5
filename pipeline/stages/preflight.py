"""Checks before a release does any work: whether this machine can hold what it makes, and serve it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from containers.hardware.gpu import Gpu, gpus
from containers.hardware.gpu_models import GpuDataError, GpuModel, find_gpu
from containers.image import profile as profiles
from evals.load.expected_memory import expect
from pipeline.compatibility.description import ModelDescription, has_experts
from pipeline.compatibility.lora import BOUNDS, CONFIGURATION, read_configuration
from pipeline.compatibility.preflight import too_long_samples
from pipeline.compatibility.scheme import PublishedScheme
from pipeline.errors import PlanError, SourceError, SpecError, UnreachableError, UnsupportedModelError
from pipeline.planner import serving
from pipeline.planner.asking import (
    describe_source,
    drafting_of,
    refusals,
    sentences,
    usual_workload,
    weights_of,
)
from pipeline.planner.data import check_data
from pipeline.planner.evaluation import check_images
from pipeline.planner.facts import read_facts
from pipeline.planner.memory import Drafting
from pipeline.planner.plan import Plan, SchemePlan, make_plan
from pipeline.planner.sources import Described, has_chat_template
from pipeline.planner.weights import FP16
from pipeline.settings import Settings
from pipeline.sources.source import ResolvedSource, read_range
from pipeline.spec import ModelSpec
from pipeline.stages import adapters, calibration, merged_source
from pipeline.stages.context import StageContext
from pipeline.stages.source import resolve
from pipeline.store.artifacts import Store, require_room
from pipeline.workers.launchers.configured import have_gpus
from registry.progress import Progress

# A model's name on a hub, and the URI of one.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)
_HUB_MODEL = re.compile(rf"hf://({_REPOSITORY.pattern})", re.ASCII)
# What vLLM leaves free of a GPU by default.
_VLLM_LEAVES = 0.08


def foresee(spec: ModelSpec, schemes: Sequence[str], settings: Settings, say: Progress) -> Plan | None:
    """Plan a release and say what it will take.

    None where the source can't be read, or what belongs to it can't be reached, which the stages explain.

    Raises:
        PlanError: the disk is too small for what will be made, or what serves it can't hold a scheme.
        UnsupportedModelError: a scheme can't be made of this model, or the model can't be served as its file says.
        SourceError: an adapter or calibration data can't be read, is refused, or does not fit the model.
        SpecError: calibration text, prompts or a task's data are not what they should be.
    """
    has_conversations = check_data(spec)
    here = gpus()
    resolved, merged = adapters.resolve(spec, settings), merged_source.resolve_adapter(spec, settings)
    if spec.calibrates:
        calibration.resolve(spec, settings)
    try:
        source = resolve(spec, settings)
        pulled = None if spec.is_published else _pulled(source, merged, settings)
        described = describe_source(spec, settings, pulled)
        chats = _chats(spec, has_conversations=has_conversations)
        if chats and spec.serve.chat_template is None and not has_chat_template(source):
            raise SpecError(
                f"{chats}, and {source.uri} has no chat template: name one by `serve: {{chat_template: file:PATH}}`"
            )
    except SourceError:
        return None
    except PlanError as error:
        say(f"no plan: {error}")
        return None
    published = None if described.published is None else described.published.scheme
    for problem in not_served_here(spec, schemes, settings, published, experts=has_experts(described.model.config)):
        say(problem)
    check_images(spec, described.model)
    try:
        to_merge = merged if pulled is None else None
        merged_source.check(to_merge, described.model)
        adapters.check(resolved, described.model)
        for warning in _other_bases(spec, to_merge, resolved):
            say(warning)
        drafting = drafting_of(spec, described.model, settings)
    except UnreachableError:  # what is locked may be here all the same
        drafting = None
    _check_schemes(described.model, spec, schemes, settings)
    try:
        planned = _planned(spec, described, [_model_of(gpu) for gpu in here[:1]], drafting)
    except UnsupportedModelError:
        raise
    except PlanError as error:
        # A model that the planner does not know yet may still be released.
        say(f"no plan: {error}")
        return None
    chosen = [scheme for scheme in planned.schemes if scheme.weights.scheme in schemes]
    for scheme in chosen:
        weights = scheme.weights
        say(f"plan: {weights.scheme} takes {weights.bytes / 1e6:,.1f} MB, {weights.bits_per_weight:.2f} bits a weight")
    on_gpu = profiles.load(spec.runtime).minimum_driver is not None
    problems = _disk(planned, settings, pulled) + [
        problem
        for scheme in chosen
        for problem in (
            _too_large_for_gpus(scheme, len(here)) if on_gpu else _too_large_for_limit(scheme, spec, settings)
        )
    ]
    if problems:
        raise PlanError("; ".join(problems))
    return planned


def _check_schemes(model: ModelDescription, spec: ModelSpec, schemes: Sequence[str], settings: Settings) -> None:
    """Refuse schemes that can't be made of the model, and calibration samples that are longer than its context."""
    wanted = {name: spec.scheme(name) for name in schemes}
    problems = sentences(refusals(model, wanted, has_gpus=have_gpus(settings)))
    if any(scheme.needs_calibration for scheme in wanted.values()):
        problems += filter(None, [too_long_samples(model, spec.calibration.max_tokens)])
    if problems:
        raise UnsupportedModelError("; ".join(problems))


def _chats(spec: ModelSpec, *, has_conversations: bool) -> str | None:
    """What in the model file needs a chat template."""
    if has_conversations:
        return "`calibration`: its data holds conversations"
    if spec.serve.tool_calls is not None:
        return "`serve.tool_calls`: the model is asked for calls by chat"
    if shown := spec.evals.image_tasks:
        return f"`{shown[0]}`: the model is shown images by chat"
    return None


def not_served_here(
    spec: ModelSpec,
    schemes: Iterable[str],
    settings: Settings,
    published: PublishedScheme | None = None,
    *,
    experts: bool,
) -> list[str]:
    """Say which schemes this machine's CPU can't serve, why, and what that means for their gates.

    ``published`` is the scheme of a source that is taken as it is; ``experts`` is whether the model has routed ones.
    """
    found = []
    for name in schemes:
        context = StageContext(spec, name, settings, progress=lambda _: None, published_scheme=published)
        lacking = context.unsupported(experts=experts)
        if lacking is None:
            continue
        gates = "`load` will be inconclusive"
        if spec.evals.engine == "served":
            gates = "`drift` and `load` will be inconclusive; with `evals: {engine: hf}` drift is measured without vLLM"
        found.append(f"{name} can't be served on this machine ({lacking}): {gates}")
    return found


def _planned(
    spec: ModelSpec, described: Described, machine: Sequence[GpuModel], drafting: Drafting | None = None
) -> Plan:
    """Plan the model as it will be tested: each scheme with one request of the context that it serves."""
    facts, model = read_facts(described.model.config), described.model
    weights = weights_of(described, spec.schemes)
    if wrong := serving.problems(spec, facts, weights):
        raise UnsupportedModelError("; ".join(wrong))
    usual = replace(usual_workload(facts), drafting=drafting)
    own = {
        each.scheme: serving.tested_workload(
            spec.serving(None if each.scheme == FP16 else each.scheme), model, usual, _VLLM_LEAVES
        )
        for each in weights
    }
    merges = spec.source.adapter is not None
    return make_plan(
        spec.model,
        facts,
        weights,
        machine,
        next(iter(own.values())),
        download_bytes=described.bytes,
        merges=merges,
        drafting=drafting,
        own=own,
    )


def _too_large_for_gpus(scheme: SchemePlan, here: int) -> list[str]:
    """Whether this machine's GPUs are enough and large enough for one replica; says what would hold it."""
    problems = []
    for placement in scheme.placements:
        name, needed = scheme.weights.scheme, placement.demand
        if needed.gpus > here:
            problems.append(f"{name}: `serve.tensor_parallel` asks for {needed.gpus} GPUs, and this machine has {here}")
        elif not placement.fits:
            problems.append(
                f"{name} needs {needed.total / 2**30:.1f} GiB on each of {needed.gpus} {placement.gpu.name}, of which "
                f"{placement.usable_bytes / 2**30:.1f} GiB are usable: set `serve.tensor_parallel` or a shorter "
                "`serve.context`; `slipway plan` says which"
            )
    return problems


def _too_large_for_limit(scheme: SchemePlan, spec: ModelSpec, settings: Settings) -> list[str]:
    """Whether a CPU's server can't start: weights, the KV cache of each rank, and the runtime's processes.

    Of the CPU behind an engine elsewhere nothing is known, so its copies of weights are not counted.
    """
    limit, weights, profile = int(spec.load.memory.limit_bytes), scheme.weights, profiles.load(spec.runtime)
    isa = settings.cpu.instruction_set
    held = weights.on_cpu(isa) if settings.engine_is_here else weights.bytes
    drafted = 0 if scheme.workload.drafting is None else scheme.workload.drafting.weights_bytes
    held += drafted
    ranks = spec.serving(weights.scheme).gpus
    expected = expect(held, profile.name, profile.full_environment, ranks)
    needed = held if expected is None else expected.total
    if needed <= limit:
        return []
    parts = f"{held / 2**30:.2f} GiB of weights"
    parts += "" if held <= weights.bytes + drafted else f", in float32 where a CPU with {isa} has no kernel for them"
    if expected is not None:
        cache, runtime = expected.kv_cache_bytes / 2**30, expected.runtime_bytes / 2**30
        parts += f", {cache:.2f} GiB of KV cache for {ranks} rank{'s' * (ranks > 1)}, {runtime:.2f} GiB of the runtime"
    given = f"`load.memory.limit_bytes` gives {limit / 2**30:.2f} GiB"
    return [f"{weights.scheme} needs {needed / 2**30:.2f} GiB ({parts}), and {given}"]


def _other_bases(spec: ModelSpec, merged: ResolvedSource | None, served: Mapping[str, ResolvedSource]) -> Iterator[str]:
    """Say which adapters name another model of a hub as their base than the model file, though they fit its layers."""
    base = _HUB_MODEL.match(spec.source.uri)
    named = {"source.adapter": merged, **{f"serve.adapters.{name}": each for name, each in served.items()}}
    for key, adapter in named.items():
        if base is None or adapter is None:
            continue
        read = read_configuration(read_range(adapter, CONFIGURATION, 0, BOUNDS.bytes + 1), "merged")
        stated = str((read.model_extra or {}).get("base_model_name_or_path"))
        if _REPOSITORY.fullmatch(stated) and stated.lower() != base[1].lower():
            yield (
                f"`{key}`: {adapter.uri} says that it was trained on `{stated}`, and the model is `{base[1]}`: its "
                "layers fit, so make sure that this is the model that you mean"
            )


def _pulled(source: ResolvedSource, adapter: ResolvedSource | None, settings: Settings) -> Path | None:
    """The folder of the source where an earlier run has pulled it."""
    recipe = merged_source.recipe_of(source, adapter)
    found = Store(settings.home / "artifacts").find(recipe.stage, recipe.key)
    return None if found is None else found.folder


def _disk(planned: Plan, settings: Settings, pulled: Path | None) -> list[str]:
    """Whether what is still to be made fits; of a source that is here, its schemes may be too, and nothing is asked."""
    if pulled is not None:
        return []
    try:
        require_room(settings.home, planned.disk_bytes, settings.disk_floor, "all of source and releases")
    except PlanError as error:
        return [str(error)]
    return []


def _model_of(gpu: Gpu) -> GpuModel:
    """This machine's GPU: its own memory, and what the data file says of its kind."""
    try:
        return find_gpu(gpu.name).model_copy(update={"memory_bytes": gpu.memory_bytes})
    except GpuDataError:
        known = {"architecture": "unknown", "bandwidth_bytes_per_s": 1.0, "flops": {"fp16": 1.0}, "watts": 1.0}
        described = {"name": gpu.name, "capability": gpu.capability, "memory_bytes": gpu.memory_bytes}
        return GpuModel.model_validate({**known, **described, "nvlink": False, "source": "NVML"})
