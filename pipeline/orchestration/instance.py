"""The Dagster instance that the command line, the UI and schedules share, and the runs in it whose process died."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from dagster import DagsterInstance, DagsterRunStatus, RunsFilter

from pipeline.resources import RESOURCES
from pipeline.settings import Settings
from registry.file_locks import is_locked, locked, locked_if_free

# A run takes its marker within a moment of its start, and ends within one of giving it back.
_UNCLAIMED = "unclaimed"
_CLAIM_SECONDS = 20.0


def storage_variables(settings: Settings) -> dict[str, str]:
    """What dagster.yaml reads of the environment."""
    return {
        "SLIPWAY_DAGSTER_STORAGE": str(settings.home / "dagster"),
        "SLIPWAY_DAGSTER_POSTGRES": settings.dagster_postgres or "",
    }


@contextlib.contextmanager
def open_instance(settings: Settings) -> Iterator[DagsterInstance]:
    """Open the instance that dagster.yaml describes, with its storage under the home or in PostgreSQL.

    Raises:
        SettingsError: PostgreSQL can't be reached.
    """
    (settings.home / "dagster").mkdir(parents=True, exist_ok=True)
    os.environ.update(storage_variables(settings))
    # Two processes that make the same new database at once would trip over each other's tables.
    with locked(settings.home / "dagster.lock"):
        opened = DagsterInstance.from_config(str(RESOURCES))
    with opened as instance:
        yield instance


@contextlib.contextmanager
def alive(run_id: str, settings: Settings) -> Iterator[None]:
    """Mark this process as the one that executes the run, by a lock that the kernel drops when the process ends.

    A second block for the same run within it has no effect.
    """
    marker = _markers(settings) / run_id
    with contextlib.ExitStack() as held:
        # A marker that is found before it is locked would look like an orphaned run's.
        with locked(_marker_lock(settings)):
            is_first = held.enter_context(locked_if_free(marker))
        yield
        if is_first:
            marker.unlink(missing_ok=True)


def fail_orphaned_runs(instance: DagsterInstance, settings: Settings) -> list[str]:
    """Mark runs whose process was killed as failed and free the pool slots that they held; return their ids.

    A run that was killed before it took its marker is given an unlocked one, so a later call marks it.
    """
    orphaned = []
    with locked(_marker_lock(settings)):
        _mark_unclaimed(instance, settings)
        for marker in _markers(settings).iterdir():
            if not is_locked(marker) and not _may_be_claimed(marker):
                if _fail(instance, marker.name):
                    orphaned.append(marker.name)
                marker.unlink(missing_ok=True)
    return orphaned


def _mark_unclaimed(instance: DagsterInstance, settings: Settings) -> None:
    """Give every run that has begun and has no marker one; in PostgreSQL it may be another machine's run."""
    if settings.dagster_postgres:
        return
    for run in instance.get_runs(RunsFilter(statuses=[DagsterRunStatus.STARTED])):
        marker = _markers(settings) / run.run_id
        if not marker.exists():
            marker.write_text(_UNCLAIMED)


def _may_be_claimed(marker: Path) -> bool:
    """Whether a run may still take this marker; a run that takes it empties it."""
    try:
        return marker.read_text() == _UNCLAIMED and time.time() - marker.stat().st_mtime < _CLAIM_SECONDS
    except FileNotFoundError:
        return False


def _fail(instance: DagsterInstance, run_id: str) -> bool:
    run = instance.get_run_by_id(run_id)
    died = run is not None and not run.is_finished
    if run is not None and died:
        instance.report_run_failed(run, "the process that carried this run was killed")
    instance.event_log_storage.free_concurrency_slots_for_run(run_id)
    return died


def _marker_lock(settings: Settings) -> Path:
    return _markers(settings).with_suffix(".lock")


def _markers(settings: Settings) -> Path:
    folder = settings.home / "dagster" / "alive"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
