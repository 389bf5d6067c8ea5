"""The asset graph as it is, how artifacts pass along it, and what a run tells the command line."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from dagster import (
    AssetExecutionContext,
    DagsterExecutionInterruptedError,
    DagsterInstance,
    DagsterInvalidConfigError,
    Definitions,
    ExecuteInProcessResult,
    Failure,
    MultiPartitionKey,
    Output,
    asset,
    build_input_context,
    build_output_context,
    define_asset_job,
    in_process_executor,
    validate_run_config,
)
from dagster._core.execution.api import create_execution_plan
from dagster._core.execution.resources_init import get_required_resource_keys_to_init
from sqlalchemy.exc import IntegrityError

from homes import DEMO
from pipeline.orchestration import checks, jobs
from pipeline.orchestration.events import stream
from pipeline.orchestration.io_manager import ArtifactHandles, partitions_stand
from pipeline.orchestration.jobs import RELEASE_JOB
from pipeline.orchestration.partitions import MODEL_FILE_TAG, RELEASES, add_partitions
from pipeline.orchestration.release_events import RunEnded, StageDone
from pipeline.orchestration.run_outcome import ending
from pipeline.spec import load
from pipeline.stages.metadata import CACHED, SECONDS, WORKER_SECONDS, ReleasedVersion
from pipeline.stages.table import BY_NAME, STAGES
from pipeline.store.artifacts import Artifact
from unit.pipeline.release_evidence import Made, settings_of

KEY = MultiPartitionKey({"model": "demo", "scheme": "gptq"})


@pytest.fixture(scope="module")
def defs() -> Definitions:
    from pipeline.definitions import defs as found  # noqa: PLC0415 - reads the environment

    return found


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(settings_of(tmp_path / "home"))


@pytest.fixture
def handles(made: Made) -> ArtifactHandles:
    return ArtifactHandles(made.settings)


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    with DagsterInstance.ephemeral() as ephemeral:
        add_partitions(ephemeral, load(DEMO.with_suffix(".yaml")))
        yield ephemeral


def test_partitions_that_another_run_adds_at_the_same_moment_are_no_error(
    instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, raced = instance.add_dynamic_partitions, list[str]()

    def add_after_a_rival(dimension: str, keys: Sequence[str]) -> None:
        add(dimension, keys)
        if dimension not in raced:
            raced.append(dimension)
            raise IntegrityError("INSERT INTO dynamic_partitions", {}, Exception("UNIQUE constraint failed"))

    monkeypatch.setattr(instance, "add_dynamic_partitions", add_after_a_rival)
    add_partitions(instance, load(DEMO.with_suffix(".yaml")))
    assert raced == ["model", "scheme"]
    assert sorted(instance.get_dynamic_partitions("scheme")) == ["awq", "gptq"]


def test_the_asset_graph_is_the_pipeline(defs: Definitions) -> None:
    graph = defs.resolve_asset_graph()
    found = {}
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        (pool,) = node.pools or [None]
        found[key.to_user_string()] = (sorted(parent.to_user_string() for parent in node.parent_keys), pool)
    # `docs/reference/stages.md`, which a test compares, shows a change of the table itself.
    assert found == {
        stage.name: (sorted({*stage.inputs, *stage.waits_for}), "gpu" if stage.device else None) for stage in STAGES
    }


def test_a_partition_is_looked_up_once_a_run_and_anew_after_it(instance: DagsterInstance) -> None:
    with partitions_stand(instance):
        assert instance.has_dynamic_partition("model", "demo")
        instance.delete_dynamic_partition("model", "demo")
        assert instance.has_dynamic_partition("model", "demo")
    assert not instance.has_dynamic_partition("model", "demo")


def test_every_job_takes_the_marker_without_which_its_runs_are_buried(defs: Definitions) -> None:
    for job in jobs.ALL:
        definition = defs.resolve_job_def(job.name)
        plan = create_execution_plan(definition)
        assert "io_manager" in get_required_resource_keys_to_init(plan, definition), job.name


def test_every_asset_is_of_one_model_in_one_scheme_and_knows_its_code(defs: Definitions) -> None:
    graph = defs.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.partitions_def == RELEASES
        assert node.code_version, f"{key.to_user_string()}: without a code version it would be the run's id"
        assert node.description
        assert node.group_name != "default"
        assert node.owners
        assert node.kinds


def test_every_gate_blocks_and_is_judged_for_each_release_alone(defs: Definitions) -> None:
    graph = defs.resolve_asset_graph()
    checks = {key.asset_key.to_user_string(): graph.get(key) for key in graph.asset_check_keys}
    rescan = checks.pop("release")
    assert not rescan.blocking
    assert set(checks) == {stage.name for stage in STAGES if stage.gate}
    assert all(check.blocking and check.partitions_def == RELEASES for check in checks.values())


def test_definitions_hold_jobs_whose_names_are_no_assets(defs: Definitions) -> None:
    repository = defs.get_repository_def()
    names = {name for name in repository.job_names if not name.startswith("__")}
    assert names
    assert not names & set(BY_NAME)


def test_a_run_may_measure_again_or_hold_a_release_back_and_nothing_else(defs: Definitions) -> None:
    job = defs.resolve_job_def(RELEASE_JOB)
    allowed = {"load": {"config": {"again": True}}, "release": {"config": {"candidate_only": True}}}
    validate_run_config(job, {"ops": allowed})
    for stage, config in (("load", {"slo": {"p95_latency_ms": 9000}}), ("release", {"candidate_only": "yes"})):
        with pytest.raises(DagsterInvalidConfigError, match=f"root:ops:{stage}:config"):
            validate_run_config(job, {"ops": {stage: {"config": config}}})


def test_an_artifact_passes_by_name_and_key(made: Made, handles: ArtifactHandles) -> None:
    artifact = made.artifacts()["quantized"]
    handles.handle_output(build_output_context(asset_key="quantized", partition_key=KEY), artifact)
    folder = handles.handles.folder
    (handle,) = folder.rglob("*.json")
    assert handle.relative_to(folder) == Path("quantized/demo@gptq.json")
    found = handles.load_input(build_input_context(asset_key="quantized", partition_key=KEY))
    assert (found.digest, found.folder) == (artifact.digest, artifact.folder)


def test_an_asset_that_was_never_made_or_was_removed_is_said_so(made: Made, handles: ArtifactHandles) -> None:
    wanted = build_input_context(asset_key="quantized", partition_key=KEY)
    with pytest.raises(Failure, match=r"`quantized` has not been made for demo\|gptq: materialize it first"):
        handles.load_input(wanted)
    artifact = made.artifacts()["quantized"]
    handles.handle_output(build_output_context(asset_key="quantized", partition_key=KEY), artifact)
    artifact.folder.parent.rename(made.settings.home / "elsewhere")
    with pytest.raises(Failure, match="was removed from the store: materialize it again"):
        handles.load_input(wanted)


def told(artifact: Artifact, **more: Any) -> Output[Artifact]:  # noqa: ANN401
    figures = {SECONDS: 2.0, WORKER_SECONDS: 1.5, CACHED: False}
    return Output(artifact, metadata={**figures, **more})


def run_small(
    made: Made, handles: ArtifactHandles, instance: DagsterInstance, error: BaseException | None = None
) -> ExecuteInProcessResult:
    """Run a pipeline in small: an asset in the place of `drift`, its real gate, and one after it."""

    @asset(partitions_def=RELEASES)
    def drift(context: AssetExecutionContext) -> Output[Artifact]:
        context.log.info("asking the candidate")
        context.log.debug("nobody's business")
        if error is not None:
            raise error
        return told(made.artifacts()["drift"])

    @asset(partitions_def=RELEASES)
    def release(drift: Artifact) -> Output[Artifact]:
        promoted = ReleasedVersion(
            outcome="promoted",
            version="1",
            aliases=("candidate",),
            manifest_digest=drift.digest,
            image="x",
            measured={},
        )
        ending = promoted.model_dump(mode="json")
        return told(drift, release=ending)

    small = Definitions(
        assets=[drift, release],
        asset_checks=[checks.BY_STAGE["drift"]],
        jobs=[define_asset_job("small", executor_def=in_process_executor)],
        resources={"settings": made.settings, "io_manager": handles},
        loggers={"stream": stream},
    )
    return small.resolve_job_def("small").execute_in_process(
        run_config={"loggers": {"stream": {}}},
        instance=instance,
        partition_key=KEY,
        raise_on_error=False,
        tags={MODEL_FILE_TAG: str(DEMO.with_suffix(".yaml"))},
    )


def ended(result: ExecuteInProcessResult) -> RunEnded:
    return ending(result.all_events, succeeded=result.success)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_run_tells_its_stages_progress_and_gates_and_nothing_else(
    made: Made, handles: ArtifactHandles, instance: DagsterInstance, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_small(made, handles, instance)
    assert result.success, ended(result).error
    events = lines(capsys)
    assert [(event["event"], event.get("stage") or event.get("name")) for event in events] == [
        ("start", "drift"), ("progress", "drift"), ("stage", "drift"), ("gate", "drift"),
        ("start", "release"), ("stage", "release"),
    ]  # fmt: skip
    assert events[1]["text"] == "asking the candidate"
    assert events[2] == StageDone(name="drift", seconds=2.0, cached=False, worker_seconds=1.5).model_dump()
    assert (events[3]["status"], events[3]["blocks"]) == ("pass", False)
    assert events[3]["metrics"]["cloze.lost"] == 1
    assert ended(result).outcome == "promoted"


def test_a_gate_that_refuses_stops_what_is_after_it(
    made: Made, handles: ArtifactHandles, instance: DagsterInstance, capsys: pytest.CaptureFixture[str]
) -> None:
    made.lost = 80
    result = run_small(made, handles, instance)
    events = lines(capsys)
    assert [event["event"] for event in events] == ["start", "progress", "stage", "gate"]
    assert (events[-1]["status"], events[-1]["blocks"]) == ("fail", True)
    end = ended(result)
    assert (end.outcome, end.release) == ("refused", None)
    assert str(end.error).startswith("drift: accuracy on `cloze`")


def test_a_stage_that_fails_is_told_by_name_in_its_own_words(
    made: Made, handles: ArtifactHandles, instance: DagsterInstance
) -> None:
    end = ended(run_small(made, handles, instance, error=Failure("the worker was killed")))
    assert end == RunEnded(outcome="failed", error="drift: the worker was killed")


def test_a_stage_that_is_interrupted_is_told_without_a_traceback(
    made: Made, handles: ArtifactHandles, instance: DagsterInstance
) -> None:
    end = ended(run_small(made, handles, instance, error=DagsterExecutionInterruptedError()))
    assert (end.outcome, end.error) == ("failed", "drift: interrupted")


def test_what_nobody_expected_is_told_with_where_it_happened(
    made: Made, handles: ArtifactHandles, instance: DagsterInstance
) -> None:
    end = ended(run_small(made, handles, instance, error=ZeroDivisionError("by nothing")))
    assert str(end.error).startswith("drift: ZeroDivisionError: by nothing")
    assert "test_definitions.py" in str(end.error)
