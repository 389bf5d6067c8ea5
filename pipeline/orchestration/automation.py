"""Schedules and sensors: what runs by itself, as each model's file says under ``automation``.

All of them are on, so a file that asks for something gets it within a minute. Where no file does, a tick reads a few
files and says so. `pipeline.stages.affected` decides which releases a tick requests; nothing here makes an artifact.
"""

import random
import time
from collections.abc import Collection, Iterator
from typing import Any

from dagster import (
    AddDynamicPartitionsRequest,
    DagsterInstance,
    DagsterRun,
    DagsterRunStatus,
    DefaultScheduleStatus,
    DefaultSensorStatus,
    DeleteDynamicPartitionsRequest,
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
from pydantic import BaseModel, ConfigDict

from pipeline.errors import SpecError
from pipeline.expected_errors import EXPECTED
from pipeline.operations.notifications import Notification, deliver, enqueue
from pipeline.orchestration.instance import fail_orphaned_runs
from pipeline.orchestration.jobs import RELEASE_JOB, release_job, rescan_job
from pipeline.orchestration.metrics import champions
from pipeline.orchestration.release import sweep
from pipeline.orchestration.run_outcome import ending, findings
from pipeline.orchestration.speed_job import speed_job
from pipeline.publishing.promotion_file import is_behind, push_champion
from pipeline.settings import Settings
from pipeline.spec import ModelSpec, load
from pipeline.stages.affected import Affected, affected, touched
from pipeline.stages.locked_sources import find_moved, locked_sources

# Runs of the queue with a higher number start first; what a person launches has 0.
_SECURITY, _CHANGE, _NIGHT, _LOAD = 10, 5, -5, -10
# Less than an attempt may take: other sensors, and promotions of the line, wait for a tick.
_PUSH_SECONDS = 40.0
_UNDER_WAY = [
    DagsterRunStatus.QUEUED, DagsterRunStatus.NOT_STARTED, DagsterRunStatus.STARTING, DagsterRunStatus.STARTED,
]  # fmt: skip
_ON = DefaultSensorStatus.RUNNING
_SETTINGS = Settings.read()
_ALERTS = DefaultSensorStatus.RUNNING if _SETTINGS.notifies else DefaultSensorStatus.STOPPED


class SensorCursor(BaseModel):
    """What a tick remembers for the next: the partitions of the models' files, and their inputs' digest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()
    touched: str = ""


@sensor(job=release_job, minimum_interval_seconds=15, default_status=_ON)
def model_file_sensor(context: SensorEvaluationContext, settings: ResourceParam[Settings]) -> SensorResult:
    """Keep partitions as the models' files say, and release models with `release: on-change` when an input changes."""
    specs, unread = _read_all(settings)
    before = SensorCursor.model_validate_json(context.cursor) if context.cursor else SensorCursor()
    # The partitions of a file that can't be read now stay.
    kept = before if unread else SensorCursor()
    models = tuple(sorted({*kept.models, *(spec.model for spec in specs)}))
    schemes = tuple(sorted({*kept.schemes, *(scheme for spec in specs for scheme in spec.schemes)}))
    watched = [spec for spec in specs if spec.automation.release == "on-change"]
    now = touched(watched, settings) if watched else ""
    found, unsure = _look(watched, settings) if now != before.touched else ([], {})
    requests = [_request(context.instance, settings, each, _CHANGE) for each in found]
    started = [request for request in requests if request]
    # The next tick looks again at releases whose dry run failed, and at those whose last run is still under way.
    settled = not unsure and len(started) == len(requests)
    return SensorResult(
        run_requests=started,
        skip_reason=None if started else SkipReason(_quiet(watched, requests, unread | unsure, "on-change")),
        dynamic_partitions_requests=[
            *_partitions(context.instance, "model", before.models, models),
            *_partitions(context.instance, "scheme", before.schemes, schemes),
        ],
        cursor=SensorCursor(
            models=models, schemes=schemes, touched=now if settled else before.touched
        ).model_dump_json(),
    )


@schedule(
    job=release_job,
    cron_schedule="0 2 * * *",
    execution_timezone=_SETTINGS.timezone,
    default_status=DefaultScheduleStatus.RUNNING,
)
def nightly(context: ScheduleEvaluationContext, settings: ResourceParam[Settings]) -> Iterator[RunRequest | SkipReason]:
    """Release models whose inputs have changed, such as a branch that moved upstream."""
    began = time.monotonic()
    specs, troubles = _read_all(settings)
    wanted = [spec for spec in specs if spec.automation.release != "by-hand"]
    for spec in wanted:
        troubles |= _follow(context, spec, settings)
    found, unsure = _look(wanted, settings)
    troubles |= unsure
    for name, why in troubles.items():
        enqueue(
            Notification(f"{name} can't be checked for changes", why, f"{settings.ui_address}/automation"), settings
        )
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
    """Scan champions with today's vulnerability database."""
    specs, _ = _read_all(settings)
    wanted = {
        f"{spec.model}-{scheme}" for spec in specs if spec.automation.rescan == "nightly" for scheme in spec.schemes
    }
    names = sorted(wanted & {champion.release for champion in champions(settings)})
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
    """Load-test champions again, to find those that have become slower since their release."""
    specs, _ = _read_all(settings)
    held = {champion.release for champion in champions(settings)}
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
def orphaned_run_sensor(context: SensorEvaluationContext, settings: ResourceParam[Settings]) -> SkipReason:
    """Mark runs whose process was killed as failed, and remove their containers, pool slots and half-made artifacts."""
    orphaned = fail_orphaned_runs(context.instance, settings)
    sweep(settings)
    return SkipReason(f"marked as failed: {', '.join(orphaned)}" if orphaned else "every run's process is alive")


@run_failure_sensor(
    default_status=_ALERTS, description="Queue a notification about a run that failed or that a gate refused."
)
def failure_alert_sensor(context: RunFailureSensorContext, settings: ResourceParam[Settings]) -> None:
    """Queue a notification about a run that failed or that a gate refused: the reason and the run's page."""
    run = context.dagster_run
    if run.tags.get("dagster/will_retry") == "true":
        return
    ended = ending(_events(context.instance, run), succeeded=False)
    enqueue(_notice(run, ended.outcome, ended.error or "", settings), settings)


@run_status_sensor(
    run_status=DagsterRunStatus.SUCCESS,
    monitored_jobs=[rescan_job],
    default_status=_ALERTS,
    description="Queue a notification about champions that a rescan refuses.",
)
def rescan_alert_sensor(context: RunStatusSensorContext, settings: ResourceParam[Settings]) -> None:
    """Queue a notification about champions that a rescan refuses."""
    for words in findings(_events(context.instance, context.dagster_run)):
        enqueue(_notice(context.dagster_run, "refused by a rescan", words, settings), settings)


@sensor(minimum_interval_seconds=15, default_status=_ALERTS)
def notification_sensor(settings: ResourceParam[Settings]) -> SkipReason:
    """Deliver queued notifications, and retry those that failed."""
    return SkipReason("; ".join(deliver(settings)) or "no notification is queued")


@sensor(minimum_interval_seconds=60, default_status=_ON)
def git_sensor(context: SensorEvaluationContext, settings: ResourceParam[Settings]) -> SkipReason:
    """Push champions to their files in Git where that failed before; queue a notification where it fails again."""
    specs, _ = _read_all(settings)
    behind = [
        (f"{spec.model}-{scheme}", spec.registry.git)
        for spec in specs
        if spec.registry.git is not None
        for scheme in spec.schemes
        if is_behind(f"{spec.model}-{scheme}", spec.registry.git, settings)
    ]
    if not behind:
        return SkipReason("every file in Git names its champion")
    # One a tick, so that a tick ends in time, and any of them, so that none waits behind one that always fails.
    name, git = random.choice(behind)  # noqa: S311 - no secret
    done = push_champion(name, git, settings, context.log.info, seconds=_PUSH_SECONDS)
    # Each line once, until its file names the champion.
    notified = set((context.cursor or "").split()) & {line for line, _ in behind}
    if done.error and name not in notified:
        subject = f"{name}: its file in Git does not name the champion"
        enqueue(Notification(subject, done.error, f"{settings.ui_address}/automation"), settings)
        notified.add(name)
    context.update_cursor(" ".join(sorted(notified)))
    return SkipReason(done.error or f"{done.file} names the champion of {name}")


SENSORS = [
    model_file_sensor, orphaned_run_sensor, failure_alert_sensor, rescan_alert_sensor, notification_sensor, git_sensor,
]  # fmt: skip
SCHEDULES = [nightly, nightly_rescan, weekly_load]


def _read_all(settings: Settings) -> tuple[list[ModelSpec], dict[str, str]]:
    """Read every model's file; return the models, and each faulty file's error."""
    specs, troubles = [], {}
    for path in sorted(settings.models.glob("*.yaml")):
        try:
            specs.append(load(path))
        except SpecError as error:
            troubles[path.name] = str(error)
    return specs, troubles


def _look(specs: list[ModelSpec], settings: Settings) -> tuple[list[Affected], dict[str, str]]:
    """Return what runs would change, and each release whose dry run failed, with its error."""
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
    """Remove the locks of sources that moved, if the model's file follows them; the next release writes new ones."""
    troubles = []
    for source in locked_sources(spec):
        try:
            moved = find_moved(source, settings)
        except EXPECTED as error:
            troubles.append(str(error))
            continue
        if moved is None:
            continue
        if spec.automation.upstream == "follow":
            context.log.info("%s moved to %s: following", source.uri, moved.now)
            source.lock.unlink(missing_ok=True)
        else:
            troubles.append(str(moved))
    return {spec.model: "; ".join(troubles)} if troubles else {}


def _request(
    instance: DagsterInstance, settings: Settings, found: Affected, priority: int, again: str = ""
) -> RunRequest | None:
    """Request the run of a release, once per change (and per ``again``); None where one is under way."""
    key = _partition(found.model, found.scheme)
    same = RunsFilter(job_name=RELEASE_JOB, statuses=_UNDER_WAY, tags={"dagster/partition": str(key)})
    if instance.get_runs_count(same):
        return None
    marked = {champion.release for champion in champions(settings) if champion.marked}
    first = _SECURITY if f"{found.model}-{found.scheme}" in marked else priority
    return RunRequest(
        run_key=f"{key}@{found.key}{again}",
        partition_key=key,
        tags={"dagster/priority": str(first), "slipway/why": found.why},
    )


def _partitions(
    instance: DagsterInstance, dimension: str, before: Collection[str], known: Collection[str]
) -> Iterator[AddDynamicPartitionsRequest | DeleteDynamicPartitionsRequest]:
    """Yield what to add and delete so that partitions match the files; partitions that no file named stay."""
    there = set(instance.get_dynamic_partitions(dimension))
    partitions = DynamicPartitionsDefinition(name=dimension)
    if added := sorted(set(known) - there):
        yield partitions.build_add_request(added)
    if gone := sorted(set(before) - set(known) & there):
        yield partitions.build_delete_request(gone)


def _quiet(watched: list[ModelSpec], requests: list[RunRequest | None], troubles: dict[str, str], word: str) -> str:
    """Say why a tick requested nothing."""
    parts = [f"{name}: {why}" for name, why in troubles.items()]
    if any(request is None for request in requests):
        parts.append("a run of what has changed is under way")
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


def _notice(run: DagsterRun, outcome: str, reason: str, settings: Settings) -> Notification:
    what = run.tags.get("dagster/partition") or run.job_name
    return Notification(f"{what} {outcome}", reason, f"{settings.ui_address}/runs/{run.run_id}")
