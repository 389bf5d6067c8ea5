"""Runs whose process was killed, on a real Dagster instance: buried, and their slots free; the living are spared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dagster import DagsterInstance, DagsterRunStatus, EventLogEntry

from pipeline.orchestration.instance import alive, fail_orphaned_runs, open_instance
from pipeline.settings import Settings

# A run's process, stopped in its middle.
CARRIER = """
import sys
from pipeline.orchestration.instance import alive
from pipeline.settings import Settings

with alive(sys.argv[1], Settings.read()):
    print("carrying", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def settings(tmp_path: Path, instance_variables: None) -> Settings:
    return Settings.read({"SLIPWAY_HOME": str(tmp_path / "home")})


@pytest.fixture
def instance(settings: Settings) -> Iterator[DagsterInstance]:
    with open_instance(settings) as opened:
        yield opened


def start_run(instance: DagsterInstance) -> str:
    """Record a run that has begun and holds the pool's one slot."""
    run = instance.create_run(
        job_name="release", run_id=None, run_config=None, resolved_op_selection=None, step_keys_to_execute=None,
        status=DagsterRunStatus.STARTED, tags={}, root_run_id=None, parent_run_id=None, job_snapshot=None,
        execution_plan_snapshot=None, parent_job_snapshot=None, asset_selection=None, asset_check_selection=None,
        op_selection=None, remote_job_origin=None, job_code_origin=None, asset_graph=None,  # type: ignore[arg-type]
    )  # fmt: skip
    instance.event_log_storage.set_concurrency_slots("gpu", 1)
    instance.event_log_storage.claim_concurrency_slot("gpu", run.run_id, "quantized")
    return run.run_id


def holders(instance: DagsterInstance) -> set[str]:
    return set(instance.event_log_storage.get_concurrency_info("gpu").active_run_ids)


def carry(run_id: str, settings: Settings) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CARRIER, run_id],
        env={"SLIPWAY_HOME": str(settings.home), "PATH": "/usr/bin:/bin"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "carrying\n"
    return process


def end(process: subprocess.Popen[str], number: signal.Signals) -> None:
    process.send_signal(number)
    process.communicate()


def test_the_instance_keeps_everything_under_the_home(instance: DagsterInstance, settings: Settings) -> None:
    start_run(instance)
    assert (settings.home / "dagster").is_dir()
    assert Path(instance.storage_directory()).is_relative_to(settings.home)
    assert not instance.telemetry_enabled


def test_what_one_process_logs_of_many_runs_another_reads_and_no_file_stays_open(settings: Settings) -> None:
    def open_files() -> list[str]:
        # One is that of the listing itself, which is closed by now.
        found = [each.readlink() for each in list(Path("/proc/self/fd").iterdir()) if each.is_symlink()]
        return [str(path) for path in found if path.is_relative_to(settings.home / "dagster" / "history" / "runs")]

    with open_instance(settings) as writer, open_instance(settings) as reader:
        runs = [start_run(writer) for _ in range(12)]
        for run_id in runs * 2:
            run = writer.get_run_by_id(run_id)
            assert run is not None
            writer.report_engine_event("layer 1 of 4", run)
        assert [len(reader.all_logs(run_id)) for run_id in runs] == [2] * 12
        # A daemon sees thousands of runs. A file, its journal and the journal's index are open, by either of the two.
        assert len(open_files()) <= 2 * 3 * 8
    assert open_files() == []


def test_who_follows_a_run_hears_of_each_event_while_its_writer_keeps_the_file_open(settings: Settings) -> None:
    heard: list[str] = []
    with open_instance(settings) as writing, open_instance(settings) as page:

        def say(text: str) -> None:
            entry = EventLogEntry(None, 20, text, "a-run", time.time(), job_name="release_model")
            writing.event_log_storage.store_event(entry)

        say("before")
        page.watch_event_logs("a-run", None, lambda entry, _: heard.append(entry.user_message))
        for text in ("first", "second"):
            say(text)
            deadline = time.monotonic() + 20
            while text not in heard and time.monotonic() < deadline:
                time.sleep(0.05)
    assert heard[-2:] == ["first", "second"]


def test_a_run_whose_process_was_killed_is_failed_and_its_slot_is_free(
    instance: DagsterInstance, settings: Settings
) -> None:
    run_id = start_run(instance)
    end(carry(run_id, settings), signal.SIGKILL)
    assert holders(instance) == {run_id}
    assert fail_orphaned_runs(instance, settings) == [run_id]
    run = instance.get_run_by_id(run_id)
    assert run is not None
    assert run.status == DagsterRunStatus.FAILURE
    assert holders(instance) == set()
    assert fail_orphaned_runs(instance, settings) == []


def test_a_run_that_goes_on_is_spared(instance: DagsterInstance, settings: Settings) -> None:
    run_id = start_run(instance)
    process = carry(run_id, settings)
    try:
        assert fail_orphaned_runs(instance, settings) == []
        run = instance.get_run_by_id(run_id)
        assert run is not None
        assert run.status == DagsterRunStatus.STARTED
        assert holders(instance) == {run_id}
    finally:
        end(process, signal.SIGKILL)
    assert fail_orphaned_runs(instance, settings) == [run_id]


def test_a_process_spares_its_own_run(instance: DagsterInstance, settings: Settings) -> None:
    run_id = start_run(instance)
    with alive(run_id, settings):
        assert fail_orphaned_runs(instance, settings) == []
    assert list((settings.home / "dagster" / "alive").iterdir()) == []


def test_a_run_that_ended_by_itself_is_left_as_it_is(instance: DagsterInstance, settings: Settings) -> None:
    run_id = start_run(instance)
    end(carry(run_id, settings), signal.SIGKILL)
    run = instance.get_run_by_id(run_id)
    assert run is not None
    instance.report_run_canceled(run)
    assert fail_orphaned_runs(instance, settings) == []
    assert holders(instance) == set()
    buried = instance.get_run_by_id(run_id)
    assert buried is not None
    assert buried.status == DagsterRunStatus.CANCELED


def test_a_process_that_died_before_its_run_was_recorded_is_no_trouble(
    instance: DagsterInstance, settings: Settings
) -> None:
    end(carry("00000000-0000-0000-0000-000000000000", settings), signal.SIGKILL)
    assert fail_orphaned_runs(instance, settings) == []
    assert list((settings.home / "dagster" / "alive").iterdir()) == []


def test_a_run_that_was_killed_before_it_said_that_it_is_alive_is_buried_after_a_while(
    instance: DagsterInstance, settings: Settings
) -> None:
    run_id = start_run(instance)
    assert fail_orphaned_runs(instance, settings) == []
    assert fail_orphaned_runs(instance, settings) == []
    (marker,) = (settings.home / "dagster" / "alive").iterdir()
    os.utime(marker, (1, 1))
    assert fail_orphaned_runs(instance, settings) == [run_id]
    assert holders(instance) == set()


@pytest.mark.parametrize("finished", [False, True], ids=["goes on", "has ended"])
def test_a_run_that_was_seen_before_it_said_that_it_is_alive_is_spared(
    instance: DagsterInstance, settings: Settings, finished: bool
) -> None:
    run_id = start_run(instance)
    assert fail_orphaned_runs(instance, settings) == []
    (marker,) = (settings.home / "dagster" / "alive").iterdir()
    os.utime(marker, (1, 1))
    run = instance.get_run_by_id(run_id)
    assert run is not None
    if finished:
        instance.report_run_canceled(run)
        assert fail_orphaned_runs(instance, settings) == []
    with alive(run_id, settings):
        assert fail_orphaned_runs(instance, settings) == []
    assert not list((settings.home / "dagster" / "alive").iterdir())


def test_a_run_that_says_twice_that_it_is_alive_is_so_until_the_outer_block_ends(
    instance: DagsterInstance, settings: Settings
) -> None:
    run_id = start_run(instance)
    with alive(run_id, settings):
        with alive(run_id, settings):
            assert fail_orphaned_runs(instance, settings) == []
        assert fail_orphaned_runs(instance, settings) == []
    assert not list((settings.home / "dagster" / "alive").iterdir())
