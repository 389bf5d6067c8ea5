"""One thin asset a stage, in the order in which a release goes through them."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dagster import (
    AssetExecutionContext,
    Config,
    DataVersion,
    MetadataValue,
    Output,
    PipesEnvContextInjector,
    ResourceParam,
    asset,
    open_pipes_session,
)
from pydantic import Field

from pipeline.expected_errors import EXPECTED
from pipeline.orchestration import asset_metadata
from pipeline.orchestration.partitions import RELEASES, spec_of
from pipeline.orchestration.previews import known_previews
from pipeline.orchestration.retries import fail
from pipeline.settings import Settings
from pipeline.stages import evaluation, promotion, table
from pipeline.stages.metadata import CACHED, SECONDS, SIZE, WORKER_SECONDS
from pipeline.stages.table import CODE, StageContext
from pipeline.store.artifacts import Artifact
from pipeline.store.materializations import MaterializationIndex
from pipeline.workers.messages import WorkerMessages

# The pool queues runs that need what models run on; within a run `StageContext.device` takes turns.
GPU = "gpu"
# One group: Dagster's graph opens with several folded up, which would hide the stages and their gates.
_asset = partial(asset, partitions_def=RELEASES, group_name="release", owners=["team:ml-engineers"])


class LoadTest(Config):
    """What a run may change of the load test. What it is held to stands in the model's file alone."""

    again: bool = Field(default=False, description="Measure once more, though nothing has changed.")


class Promotion(Config):
    """What a run may change of the promotion: only to let less of it happen."""

    candidate_only: bool = Field(
        default=False, description="Leave the champion as it is; the release is a candidate for `slipway promote`."
    )


@_asset(kinds={"huggingface"}, code_version=CODE["source"])
def source(context: AssetExecutionContext, settings: ResourceParam[Settings]) -> Output[Artifact]:
    """The model's weights at a pinned revision: safetensors only, every file's sha256 known and locked."""
    return _run(context, settings, table.source, asset_metadata.files)


@_asset(kinds={"pytorch"}, code_version=CODE["quantized"], pool=GPU)
def quantized(context: AssetExecutionContext, settings: ResourceParam[Settings], source: Artifact) -> Output[Artifact]:
    """The weights in few bits, made by AutoAWQ, GPTQModel or AutoGPTQ, and checked without their help."""
    return _run(context, settings, table.quantized, asset_metadata.files, source)


@_asset(kinds={"docker"}, code_version=CODE["image"])
def image(context: AssetExecutionContext, settings: ResourceParam[Settings], quantized: Artifact) -> Output[Artifact]:
    """The container that ships: pinned base, pinned wheels, the checkpoint inside."""
    return _run(context, settings, table.image, asset_metadata.image, quantized)


# `deps` order what shares no data: here so that one scheme is quantized while the runtime is put together for another,
# further down so that a gate that refuses stops everything after it.
@_asset(kinds={"vllm"}, code_version=CODE["answers"], pool=GPU, deps=[image])
def baseline(context: AssetExecutionContext, settings: ResourceParam[Settings], source: Artifact) -> Output[Artifact]:
    """What FP16 answers, item by item; once for a model, a suite and an engine, whatever the scheme."""
    return _run(context, settings, evaluation.baseline, asset_metadata.answers, source)


@_asset(kinds={"vllm"}, code_version=CODE["drift"], pool=GPU)
def drift(
    context: AssetExecutionContext,
    settings: ResourceParam[Settings],
    source: Artifact,
    baseline: Artifact,
    quantized: Artifact,
    image: Artifact,
) -> Output[Artifact]:
    """What was lost: the answers of the image that ships paired with FP16's, with intervals."""
    return _run(context, settings, evaluation.drift, asset_metadata.drift, source, baseline, quantized, image)


@_asset(kinds={"trivy"}, code_version=CODE["scan"], deps=[drift])
def scan(
    context: AssetExecutionContext, settings: ResourceParam[Settings], image: Artifact, quantized: Artifact
) -> Output[Artifact]:
    """Known vulnerabilities, secrets, misconfiguration and the SBOM of that very image."""
    return _run(context, settings, table.scan, asset_metadata.scan, image, quantized)


@_asset(kinds={"vllm"}, code_version=CODE["load"], pool=GPU, deps=[scan])
def load(
    context: AssetExecutionContext,
    config: LoadTest,
    settings: ResourceParam[Settings],
    image: Artifact,
    quantized: Artifact,
) -> Output[Artifact]:
    """Latency, throughput, errors and memory of that very image under open-loop load."""
    return _run(context, settings, partial(table.load, again=config.again), asset_metadata.load, image, quantized)


@_asset(kinds={"mlflow"}, code_version=CODE["release"])
def release(
    context: AssetExecutionContext,
    config: Promotion,
    settings: ResourceParam[Settings],
    source: Artifact,
    quantized: Artifact,
    drift: Artifact,
    image: Artifact,
    scan: Artifact,
    load: Artifact,
) -> Output[Artifact]:
    """The signed manifest over all of it, registered and promoted."""
    told = partial(asset_metadata.release, candidate_only=config.candidate_only)
    return _run(context, settings, promotion.sealed, told, source, quantized, drift, image, scan, load)


ALL = [source, quantized, image, baseline, drift, scan, load, release]


def _run(
    context: AssetExecutionContext,
    settings: Settings,
    stage: Callable[..., Artifact],
    told: Callable[[StageContext, Artifact], Mapping[str, Any]],
    *upstream: Artifact,
) -> Output[Artifact]:
    """Run a stage at its bench and tell what it made; an expected error becomes a one-line failure."""
    started = time.monotonic()
    MaterializationIndex(settings).begin(context.partition_key)
    try:
        spec, scheme = spec_of(context, settings)
        bench = StageContext(spec, scheme, settings, context.log.info, lambda folder: _pipes(context, folder))
        made = stage(bench, *upstream)
        seen = told(bench, made)
    except EXPECTED as error:
        fail(context, error)
    metadata = {
        **seen,
        SECONDS: round(time.monotonic() - started, 3),
        WORKER_SECONDS: 0.0 if made.cached else round(made.worker_seconds, 3),
        CACHED: made.cached,
        SIZE: made.size_bytes,
        "digest": made.digest,
        "size": MetadataValue.text(f"{made.size_bytes / 1e6:.1f} MB"),
        "folder": MetadataValue.path(made.folder),
    }
    with known_previews():
        return Output(made, data_version=DataVersion(made.digest), metadata=metadata)


@contextlib.contextmanager
def _pipes(context: AssetExecutionContext, folder: Path) -> Iterator[Mapping[str, str]]:
    """Open a Dagster Pipes session around one worker; yields the variables by which it finds its messages' file."""
    with contextlib.ExitStack() as open_until_done:
        with known_previews():
            session = open_pipes_session(context, PipesEnvContextInjector(), WorkerMessages(folder))
            variables = open_until_done.enter_context(session).get_bootstrap_env_vars()
        yield variables
