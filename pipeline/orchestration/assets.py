"""Dagster's assets: one for each stage of the table. The release's asset promotes what its stage has signed."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dagster import (
    AssetExecutionContext,
    AssetIn,
    AssetsDefinition,
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
from pipeline.stages.context import StageContext
from pipeline.stages.metadata import CACHED, SECONDS, SIZE, WORKER_SECONDS
from pipeline.stages.promotion import promote
from pipeline.stages.run import run
from pipeline.stages.stage import Stage
from pipeline.stages.table import LOAD, RELEASE, STAGES
from pipeline.store.artifacts import Artifact
from pipeline.store.materializations import MaterializationIndex
from pipeline.workers.messages import WorkerMessages

# The pool queues runs that need a device; within a run, `StageContext.device` takes turns.
GPU = "gpu"


class LoadTest(Config):
    """What a run may change of the load test. Its limits are in the model's file alone."""

    again: bool = Field(default=False, description="Measure once more, though nothing has changed.")


class Promotion(Config):
    """What a run may change of the promotion: only that less of it happens."""

    candidate_only: bool = Field(
        default=False, description="Leave the champion as it is; the release is a candidate for `slipway promote`."
    )


_CONFIGS: Mapping[str, type[Config]] = {LOAD.name: LoadTest, RELEASE.name: Promotion}


def _asset(stage: Stage) -> AssetsDefinition:
    """Make the asset of a stage; its inputs and code version are the table's."""

    def compute(
        context: AssetExecutionContext, settings: ResourceParam[Settings], **inputs: Artifact
    ) -> Output[Artifact]:
        config = context.op_execution_context.op_config if stage.name in _CONFIGS else {}
        return _run(context, settings, stage, inputs, **config)

    compute.__name__ = stage.name
    config = _CONFIGS.get(stage.name)
    return asset(
        name=stage.name,
        description=stage.description,
        ins={name: AssetIn() for name in stage.inputs},
        # They order what shares no data: a gate that blocks stops every stage that waits for its own.
        deps=stage.waits_for,
        config_schema=None if config is None else config.to_fields_dict(),
        kinds={stage.tool},
        pool=GPU if stage.device else None,
        code_version=stage.code_version,
        partitions_def=RELEASES,
        # One group: with several, Dagster's graph opens folded up and hides the stages and their gates.
        group_name="release",
        owners=["team:ml-engineers"],
    )(compute)


def _run(
    context: AssetExecutionContext,
    settings: Settings,
    stage: Stage,
    inputs: Mapping[str, Artifact],
    *,
    again: bool = False,
    candidate_only: bool = False,
) -> Output[Artifact]:
    """Run a stage, promote its release, and describe both; an expected error becomes a one-line failure."""
    started = time.monotonic()
    MaterializationIndex(settings).begin(context.partition_key)
    try:
        spec, scheme = spec_of(context, settings)
        stage_context = StageContext(spec, scheme, settings, context.log.info, partial(_pipes, context))
        made = run(stage, stage_context, inputs, anew=again)
        metadata = asset_metadata.describe(stage, stage_context, made)
        if stage is RELEASE:
            promoted = promote(stage_context, made, candidate_only=candidate_only)
            metadata |= asset_metadata.describe_promotion(stage_context, made, promoted)
    except EXPECTED as error:
        fail(context, error)
    metadata |= {
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
    """Open a Dagster Pipes session around one worker; yield the variables by which it finds its messages' file."""
    with contextlib.ExitStack() as open_until_done:
        with known_previews():
            session = open_pipes_session(context, PipesEnvContextInjector(), WorkerMessages(folder))
            variables: Mapping[str, Any] = open_until_done.enter_context(session).get_bootstrap_env_vars()
        yield variables


ALL = [_asset(stage) for stage in STAGES]
