"""What happens without anybody asking: schedules and sensors, as each model's file says under ``automation``.

All of them are on, so that a file that asks for something has it within a minute; where no file asks for anything, a
tick looks at a few files and says so. What a tick would start is decided by `pipeline.stages.affected`; nothing here
makes anything.
"""

import json
import time
from collections.abc import Iterator
from typing import Any

from dagster import (
    DagsterInstance,
    DagsterRun,
    DagsterRunStatus,
    DefaultScheduleStatus,
    DefaultSensorStatus,
    DynamicPartitionsDefinition,
    MultiPartitionKey,
    ResourceParam,
    RunFailureSensorContext,
    RunRequest,
    RunsFilter,
    RunStatusSensorContext,
    ScheduleEvaluationContext,
    SensorEvaluationContext,
    SensorResult,
    SkipReason,
    run_failure_sensor,
    run_status_sensor,
    schedule,
    sensor,
)

from pipeline.errors import SpecError
from pipeline.expected_errors import EXPECTED
from pipeline.operations.metrics import champions
from pipeline.operations.notifications import Notice, deliver, keep
from pipeline.orchestration.instance import bury_dead_runs
from pipeline.orchestration.jobs import RELEASE_JOB, release_job, rescan_job
from pipeline.orchestration.release import sweep
from pipeline.orchestration.run_outcome import ending, findings
from pipeline.orchestration.speed_job import speed_job
from pipeline.settings import Settings
from pipeline.spec import ModelSpec, load
from pipeline.stages.affected import Affected, affected, moved_upstream, touched

# Runs of the queue with a higher number start first; what a person launches has 0.
_SECURITY, _CHANGE, _NIGHT, _LOAD = 10, 5, -5, -10
_UNDER_WAY = [
    DagsterRunStatus.QUEUED, DagsterRunStatus.NOT_STARTED, DagsterRunStatus.STARTING, DagsterRunStatus.STARTED,
]  # fmt: skip
_ON = DefaultSensorStatus.RUNNING
_SETTINGS = Settings.read()
_TOLD = DefaultSensorStatus.RUNNING if _SETTINGS.notifies else DefaultSensorStatus.STOPPED


@sensor(job=release_job, minimum_interval_seconds=15, default_status=_ON)
def models(context: SensorEvaluationContext, settings: ResourceParam[Settings]) -> SensorResult:
    """Partitions follow the models' files; a model that says `release: on-change` is released when an input changes."""
    specs, unread = _read_all(settings)
    before = json.loads(context.cursor) if context.cursor else {"models": [], "schemes": [], "touched": ""}
    # A file that can't be read now keeps what it named before.
    kept = before if unread else {"models": [], "schemes": []}
    known = {
        "models": sorted({*kept["models"], *(spec.model for spec in specs)}),
        "schemes": sorted({*kept["schemes"], *(scheme for spec in specs for scheme in spec.schemes)}),
    }
    watched = [spec for spec in specs if spec.automation.release == "on-change"]
    now = touched(watched, settings) if watched else ""
    found, unsure = _look(watched, settings) if now != before["touched"] else ([], {})
    requests = [_request(context.instance, settings, each, _CHANGE) for each in found]
    started = [request for request in requests if request]
    # Looked at again at the next tick: what could not be told, and what waits for a run that is under way.
    settled = not unsure and len(started) == len(requests)
    return SensorResult(
        run_requests=started,
        skip_reason=None if started else SkipReason(_quiet(watched, requests, unread | unsure, "on-change")),
        dynamic_partitions_requests=_partitions(context.instance, before, known),
        cursor=json.dumps({**known, "touched": now if settled else before["touched"]}),
    )


@schedule(
    job=release_job,
    cron_schedule="0 2 * * *",
    execution_timezone=_SETTINGS.timezone,
    default_status=DefaultScheduleStatus.RUNNING,
)
def nightly(context: ScheduleEvaluationContext, settings: ResourceParam[Settings]) -> Iterator[RunRequest | SkipReason]:
    """Release anew what an input of has changed, branches that moved upstream among them; nothing, if nothing has."""
    began = time.monotonic()
    specs, troubles = _read_all(settings)
    wanted = [spec for spec in specs if spec.automation.release != "by-hand"]
    for spec in wanted:
        troubles |= _follow(context, spec, settings)
    found, unsure = _look(wanted, settings)
    troubles |= unsure
    for name, why in troubles.items():
        keep(Notice(f"{name} can't be looked at", why, f"{settings.ui_address}/automation"), settings)
    requests = [_request(context.instance, settings, each, _NIGHT, again=_day(context)) for each in found]
    started = [request for request in requests if request]
    yield from started
    if not started:
        words = _quiet(wanted, requests, troubles, "nightly")
        yield SkipReason(f"{words} ({time.monotonic() - began:.1f} s)")


@schedule(
    job=rescan_job,
    cron_schedule="0 1 * * *",
    execution_timezone=_SETTINGS.timezone,
    default_status=DefaultScheduleStatus.RUNNING,
)
def nightly_rescan(context: ScheduleEvaluationContext, settings: ResourceParam[Settings]) -> RunRequest | SkipReason:
    """Look at champions with today's vulnerability database."""
    specs, _ = _read_all(settings)
    wanted = {
        f"{spec.model}-{scheme}" for spec in specs if spec.automation.rescan == "nightly" for scheme in spec.schemes
    }
    names = sorted(wanted & {str(champion["release"]) for champion in champions(settings)})
    if not names:
        return SkipReason("no champion's file says `automation: {rescan: nightly}`")
    config = {"ops": {"release_rescan": {"config": {"lines": names}}}}
    return RunRequest(run_key=_day(context), run_config=config, tags={"dagster/priority": str(_NIGHT)})


@schedule(
    job=speed_job,
    cron_schedule="0 4 * * 0",
    execution_timezone=_SETTINGS.timezone,
    default_status=DefaultScheduleStatus.RUNNING,
)
def weekly_load(
    context: ScheduleEvaluationContext, settings: ResourceParam[Settings]
) -> Iterator[RunRequest | SkipReason]:
    """Put champions under load again: has anything made them slower than they were released?"""
    specs, _ = _read_all(settings)
    held = {str(champion["release"]) for champion in champions(settings)}
    wanted = [
        _partition(spec.model, scheme)
        for spec in specs
        if spec.automation.load == "weekly"
        for scheme in spec.schemes
        if f"{spec.model}-{scheme}" in held
    ]
    for key in wanted:
        yield RunRequest(run_key=f"{key}@{_day(context)}", partition_key=key, tags={"dagster/priority": str(_LOAD)})
    if not wanted:
        yield SkipReason("no champion's file says `automation: {load: weekly}`")


@sensor(minimum_interval_seconds=10, default_status=_ON)
def the_dead(context: SensorEvaluationContext, settings: ResourceParam[Settings]) -> SkipReason:
    """Bury runs whose process was killed, and remove what they left: containers, slots, half-made artifacts."""
    dead = bury_dead_runs(context.instance, settings)
    sweep(settings)
    return SkipReason(f"buried {', '.join(dead)}" if dead else "every run's process lives")


@run_failure_sensor(default_status=_TOLD)
def failures(context: RunFailureSensorContext, settings: ResourceParam[Settings]) -> None:
    """Have told of every run of the queue that failed or was refused: why, and where to look."""
    run = context.dagster_run
    if run.tags.get("dagster/will_retry") == "true":
        return
    ended = ending(_events(context.instance, run), succeeded=False)
    keep(_notice(run, ended["outcome"], ended["error"], settings), settings)


@run_status_sensor(run_status=DagsterRunStatus.SUCCESS, monitored_jobs=[rescan_job], default_status=_TOLD)
def found_wanting(context: RunStatusSensorContext, settings: ResourceParam[Settings]) -> None:
    """Have told of champions that a rescan refuses."""
    for words in findings(_events(context.instance, context.dagster_run)):
        keep(_notice(context.dagster_run, "found wanting", words, settings), settings)


@sensor(minimum_interval_seconds=15, default_status=_TOLD)
def notices(settings: ResourceParam[Settings]) -> SkipReason:
    """Tell what is to be told, and again what could not be told before."""
    return SkipReason("; ".join(deliver(settings)) or "everybody has been told")


SENSORS = [models, the_dead, failures, found_wanting, notices]
SCHEDULES = [nightly, nightly_rescan, weekly_load]


def _read_all(settings: Settings) -> tuple[list[ModelSpec], dict[str, str]]:
    """Every model whose file is right, and what is wrong with the others."""
    specs, troubles = [], {}
    for path in sorted(settings.models.glob("*.yaml")):
        try:
            specs.append(load(path))
        except SpecError as error:
            troubles[path.name] = str(error)
    return specs, troubles


def _look(specs: list[ModelSpec], settings: Settings) -> tuple[list[Affected], dict[str, str]]:
    """What runs would change, and of which releases that can't be told."""
    found, troubles = [], {}
    for spec in specs:
        for scheme in spec.schemes:
            try:
                changed = affected(spec, scheme, settings)
            except EXPECTED as error:
                troubles[f"{spec.model}|{scheme}"] = str(error)
            else:
                found += [changed] if changed else []
    return found, troubles


def _follow(context: ScheduleEvaluationContext, spec: ModelSpec, settings: Settings) -> dict[str, str]:
    """Drop the lock of a branch that moved, where the model's file says to follow it; the release writes a new one."""
    try:
        commit = moved_upstream(spec, settings)
    except EXPECTED as error:
        return {spec.model: str(error)}
    if commit and spec.automation.upstream == "follow":
        context.log.info("%s moved to %s: following", spec.source.uri, commit)
        spec.lock.unlink(missing_ok=True)
    elif commit:
        return {
            spec.model: f"{spec.source.uri} moved to {commit[:12]}, and {spec.lock.name} stays: delete it to follow"
        }
    return {}


def _request(
    instance: DagsterInstance, settings: Settings, found: Affected, priority: int, again: str = ""
) -> RunRequest | None:
    """Ask for the run of a release, once for what has changed (and each ``again``); None where one is under way."""
    key = _partition(found.model, found.scheme)
    same = RunsFilter(job_name=RELEASE_JOB, statuses=_UNDER_WAY, tags={"dagster/partition": str(key)})
    if instance.get_runs_count(same):
        return None
    marked = {champion["release"] for champion in champions(settings) if champion["marked"]}
    first = _SECURITY if f"{found.model}-{found.scheme}" in marked else priority
    return RunRequest(
        run_key=f"{key}@{found.key}{again}",
        partition_key=key,
        tags={"dagster/priority": str(first), "slipway/why": found.why},
    )


def _partitions(instance: DagsterInstance, before: dict[str, Any], known: dict[str, list[str]]) -> list[Any]:
    """What to add and to delete so that partitions are those of the files; what a file never named is left alone."""
    requests: list[Any] = []
    for dimension, name in (("model", "models"), ("scheme", "schemes")):
        there = set(instance.get_dynamic_partitions(dimension))
        partitions = DynamicPartitionsDefinition(name=dimension)
        added = sorted(set(known[name]) - there)
        gone = sorted(set(before[name]) - set(known[name]) & there)
        requests += [partitions.build_add_request(added)] if added else []
        requests += [partitions.build_delete_request(gone)] if gone else []
    return requests


def _quiet(watched: list[ModelSpec], requests: list[RunRequest | None], troubles: dict[str, str], word: str) -> str:
    """Why a tick started nothing."""
    parts = [f"{name}: {why}" for name, why in troubles.items()]
    if any(request is None for request in requests):
        parts.append("runs of what has changed are under way")
    elif not watched:
        parts.append(f"no model's file says `automation: {{release: {word}}}`")
    elif not requests and not troubles:
        parts.append(f"nothing changed; releases looked at: {sum(len(spec.schemes) for spec in watched)}")
    return "; ".join(parts)


def _partition(model: str, scheme: str) -> MultiPartitionKey:
    return MultiPartitionKey({"model": model, "scheme": scheme})


def _day(context: ScheduleEvaluationContext) -> str:
    return f"{context.scheduled_execution_time:%Y-%m-%d}"


def _events(instance: DagsterInstance, run: DagsterRun) -> Iterator[Any]:
    return (entry.dagster_event for entry in instance.all_logs(run.run_id) if entry.dagster_event)


def _notice(run: DagsterRun, outcome: str, reason: str, settings: Settings) -> Notice:
    what = run.tags.get("dagster/partition") or run.job_name
    return Notice(f"{what} {outcome}", reason, f"{settings.ui_address}/runs/{run.run_id}")
