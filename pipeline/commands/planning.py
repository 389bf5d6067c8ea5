"""``slipway plan``: the memory, GPUs, speed and cost of a model or release, computed before anything runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from pipeline.commands.show import USAGE, as_json, print_json, print_table, results, styled
from pipeline.settings import Settings

if TYPE_CHECKING:
    from containers.hardware.gpu_models import GpuModel
    from containers.image.gpu_compatibility import Needs
    from pipeline.planner.document import MeasuredRelease, PlannedEvaluation
    from pipeline.planner.memory import Workload
    from pipeline.planner.plan import Placement, Plan
    from pipeline.spec import ModelSpec
    from registry.pull import ReleaseMetadata


@click.command()
@click.argument("model")
@click.option("--gpu", "gpus", multiple=True, metavar="NAME", help="Plan for this GPU (H100, L4, …) only; repeatable.")
@click.option("--context", type=click.IntRange(1), metavar="N", help="Tokens per request: prompt and answer together.")
@click.option("--concurrency", type=click.IntRange(1), metavar="N", help="Concurrent requests.")
@click.option(
    "--kv-cache",
    type=click.Choice(["16", "8"]),
    help="Bits per number in the KV cache. Default: those of the model file's `serve`, else 16.",
)
@click.option(
    "--headroom",
    type=click.FloatRange(0, 0.9),
    help="Share of a GPU's memory that stays free. Default: what `serve.gpu_memory` leaves, else 0.2.",
)
@click.option("--driver", metavar="VERSION", help="The NVIDIA driver of the target host, for example 550.54.15.")
@as_json
def plan(
    model: str,
    gpus: Sequence[str],
    context: int | None,
    concurrency: int | None,
    kv_cache: str | None,
    headroom: float | None,
    driver: str | None,
    *,
    as_json: bool,
) -> None:
    """Plan MODEL's memory, GPUs, speed, disk and evaluation.

    MODEL is a name in models/, a path to such a file, the URI of a source, such as hf://ORG/NAME, or a release
    NAME[@ALIAS]. For a release, the measurements of its load test are shown beside the prediction. Only config.json and
    the headers of the safetensors files are read, wherever they are. What the model file's `serve` leaves out is
    proposed for each GPU. Exit status 2 if a scheme in the model's file can't be applied to this model, or be served as
    the file says.
    """
    from dataclasses import replace

    from containers.hardware.gpu_models import find_gpu, known_gpus
    from pipeline.planner.asking import measured
    from pipeline.planner.evaluation import evaluation

    settings = Settings.read()
    wanted = [find_gpu(name) for name in gpus] or list(known_gpus())

    def workload(usual: Workload) -> Workload:
        return replace(
            usual,
            context=context or usual.context,
            concurrency=concurrency or usual.concurrency,
            kv_number_bytes=usual.kv_number_bytes if kv_cache is None else int(kv_cache) // 8,
            headroom=usual.headroom if headroom is None else headroom,
        )

    found, release = _asked(model, settings, wanted, workload)
    spec = _model_file(model, settings)
    gates = [*_gate(_needs(spec, release), wanted, driver), *_not_served(spec, settings, found)]
    found = replace(found, notes=[*found.notes, *gates])
    measurements = None if release is None else measured(release)
    asked = None if spec is None else evaluation(spec)
    if as_json:
        print_json(found.document(measurements, asked).model_dump(mode="json", by_alias=True))
    else:
        _show(found)
        _show_measured(found, measurements)
        if asked is not None:
            _show_evaluation(asked)
    if found.refused and not _is_uri(model):
        sys.exit(USAGE)


def _asked(model: str, settings: Settings, gpus: Sequence[Any], workload: Any) -> tuple[Plan, ReleaseMetadata | None]:  # noqa: ANN401
    """Plan the model, source or release that ``model`` names; return the release too if it is one."""
    from pipeline.errors import SpecError
    from pipeline.planner import asking
    from pipeline.planner.data import check_data
    from pipeline.spec import find, load

    if _is_uri(model):
        return asking.plan_source(model, settings, gpus, workload), None
    if "@" not in model:
        try:
            path = find(model, settings.models)
        except SpecError as error:
            unknown = error
        else:
            spec = load(path)
            check_data(spec)
            return asking.plan_source(spec, settings, gpus, workload), None
        if not _is_released(model, settings):
            raise unknown
    found = asking.look(model, settings)
    return asking.plan_release(found, gpus, workload), found


def _model_file(model: str, settings: Settings) -> ModelSpec | None:
    """The model's file that ``model`` names; None if it is a source's URI or a release."""
    from pipeline.errors import SpecError
    from pipeline.spec import find, load

    if _is_uri(model) or "@" in model:
        return None
    try:
        path = find(model, settings.models)
    except SpecError:
        return None  # a release: `_asked` has found it
    return load(path)


def _show_evaluation(evaluation: PlannedEvaluation) -> None:
    """Print the tasks, and the smallest loss that each detects with a power of 80%."""
    results.print(
        f"\nsuite {escape(evaluation.suite)} ({evaluation.digest[:19]}), engine {evaluation.engine}:"
        f" {evaluation.items:,} items, about {evaluation.tokens:,} tokens per model. The smallest loss that it"
        " detects with 80% power if 2, 5 or 10% of the answers change, as is usual at four bits:"
    )
    rows = []
    for task in evaluation.tasks:
        unit = "%" if task.kind == "text" else "pp"
        seen = [task.detectable] if isinstance(task.detectable, float) else list(task.detectable.values())
        rows.append(
            (
                task.name,
                task.tier,
                f"{task.items:,}",
                f"{task.tokens:,}",
                f"{100 * task.limit:.2f} {unit}",
                " / ".join(f"{100 * value:.2f}" for value in seen) + f" {unit}",
                "yes" if task.can_decide else f"[yellow]no: needs {task.items_wanted:,} items[/]",
            )
        )
    print_table(("task", "tier", "items", "tokens", "allowed", "detects", "decides if 5% change"), rows)


def _needs(spec: ModelSpec | None, release: ReleaseMetadata | None) -> Needs | None:
    """The requirements on a host: of a release's image or of a model file's runtime; None for a source's URI."""
    import json

    from containers.image import gpu_compatibility, profile
    from pipeline.planner.asking import IMAGE

    if release is not None:
        return (
            gpu_compatibility.needs_of(json.loads(release.files[IMAGE])["labels"]) if IMAGE in release.files else None
        )
    if spec is None:
        return None
    runtime = profile.load(spec.runtime)
    return gpu_compatibility.needs_of({**gpu_compatibility.labels_of(runtime), gpu_compatibility.RUNTIME: runtime.name})


def _not_served(spec: ModelSpec | None, settings: Settings, found: Plan) -> list[str]:
    """The schemes that this machine's CPU can't serve, where the model's runtime is one for CPUs."""
    from pipeline.stages.preflight import not_served_here

    return (
        []
        if spec is None
        else not_served_here(spec, spec.schemes, settings, found.published, experts=found.facts.experts > 1)
    )


def _gate(needs: Needs | None, gpus: Sequence[GpuModel], driver: str | None) -> list[str]:
    """The host that the image requires (driver, CUDA, compute capability), and which of these GPUs do not meet it."""
    from containers.hardware.gpu import Gpu
    from containers.image import gpu_compatibility

    if needs is None:
        return []
    if needs.driver is None:
        return [f"{needs.runtime} runs on CPU cores and needs no driver"]
    hosts = [Gpu(0, "", each.name, each.memory_bytes, driver or "", each.capability) for each in gpus]
    refused = sorted({problem for host in hosts for problem in gpu_compatibility.problems(needs, host)})
    known = ", ".join(needs.capabilities)
    asks = f"{needs.runtime} needs NVIDIA driver {needs.driver}, CUDA {needs.cuda}, compute capability {known}"
    return [asks, *(f"refused: {problem}" for problem in refused)]


def _is_uri(model: str) -> bool:
    """Whether ``model`` is a source's URI: its schemes are only proposed, so that refusing one is not an error."""
    return re.match(r"[a-z][a-z0-9+.-]+:", model) is not None


def _is_released(name: str, settings: Settings) -> bool:
    from registry import catalog

    return name in catalog.names(settings.tracking_uri)


def _show(found: Plan) -> None:
    """Print the plan for a person."""
    from pipeline.planner.asking import sentences

    facts, work = found.facts, found.workload
    results.print(
        f"[bold]{escape(found.model)}[/]: {facts.architecture}, {len(facts.layers)} layers, {facts.attention}"
    )
    kept = facts.kv_bytes(work.context, work.kv_number_bytes)
    results.print(
        f"KV cache: {facts.kv_bytes_per_token(work.kv_number_bytes):,} bytes per token, {_size(kept)} per request of "
        f"{work.context:,} tokens, {_size(work.concurrency * kept)} for {work.concurrency} concurrent requests"
    )
    results.print(f"download: {_size(found.download_bytes)}; disk for all schemes: {_size(found.disk_bytes)}\n")
    print_table(
        (
            "scheme",
            "weights",
            "GPUs",
            "needed each",
            "usable each",
            "KV cache",
            "requests",
            "context",
            "tokens/s, one",
            "tokens/s, all",
            "$/h",
            "$/M at least",
        ),
        [_row(scheme.weights, placement) for scheme in found.schemes for placement in scheme.placements],
    )
    results.print(
        f"\nusable: with {work.headroom:.0%} of the GPU left free; KV cache: of one replica; requests: how many of "
        f"{work.context:,} tokens it holds; context: the longest of which it holds {work.concurrency}; tokens/s: upper "
        f"bounds by memory bandwidth and arithmetic, at {work.concurrency} requests. GPUs and context are what "
        "`serve.tensor_parallel` and `serve.context` may be."
    )
    for note in found.notes:
        results.print(f"[dim]{escape(note)}[/]")
    for sentence in sentences(found.refused):
        results.print(f"{styled('refused')}: {escape(sentence)}")


def _row(weights: Any, placement: Placement) -> tuple[str, ...]:  # noqa: ANN401 - as the plan has it
    demand, speed = placement.demand, placement.speed
    price, least = placement.dollars_per_hour, placement.dollars_per_million_at_least
    where = f"{demand.gpus} x {placement.gpu.name}"
    context = placement.longest_context
    return (
        escape(weights.scheme),
        _size(weights.bytes),
        where if placement.fits else f"[red]does not fit[/] {where}",
        _size(demand.total),
        _size(placement.usable_bytes),
        _size(placement.cache_bytes) if placement.fits else "-",
        f"{placement.most_requests:,}" if placement.fits else "-",
        f"{context:,}" if context is not None and placement.fits else "-",
        f"{speed.one_request:,.0f}" if placement.fits else "-",
        f"{speed.all_requests:,.0f}" if placement.fits else "-",
        f"{price:.2f}" if price is not None and placement.fits else "-",
        f"{least:.3g}" if least is not None and placement.fits else "-",
    )


def _show_measured(found: Plan, measurements: MeasuredRelease | None) -> None:
    """Print the load test's measurements beside the prediction."""
    if measurements is None:
        return
    peak = measurements.peak_memory_bytes
    if measurements.expected is not None:
        results.print(f"\nmeasured in the sandbox: {escape(measurements.expected.sentence)}")
    elif peak:
        weights = found.schemes[0].weights.bytes
        results.print(f"\nmeasured in the sandbox: peak {_size(peak)}, of which {_size(weights)} are weights")
    rate = measurements.output_tokens_per_second
    if rate:
        where = "at its capacity" if measurements.at_capacity else "at the requested rate"
        results.print(f"measured: {rate:,.0f} tokens/s, {where}")


def _size(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 100 * size else f"{value / size:,.0f} {unit}"
    return f"{value:.0f} B"
