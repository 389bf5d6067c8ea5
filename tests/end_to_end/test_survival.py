"""Killed at any point: after the restart the release is whole, promoted once, and nothing is left of the dead."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from containers.engine.owner import home_digest
from homes import Slipway, forget, made_by
from pipeline.orchestration.instance import open_instance
from pipeline.settings import Settings
from ui_server import PATIENCE_SECONDS, RUNS, Ui, processes_of, workers_of


@pytest.fixture
def ui(slipway: Slipway, released: dict[str, Any]) -> Iterator[Callable[[], Ui]]:
    """Starts the servers, and in the end ends the last ones that it started."""
    started: list[Ui] = []

    def start() -> Ui:
        started.append(Ui(slipway))
        started[-1].announced()
        return started[-1]

    yield start
    if started[-1].process.poll() is None:
        assert started[-1].end(signal.SIGTERM) == 0
    assert processes_of(slipway.home) == {}


@pytest.fixture(autouse=True)
def nothing_left(slipway: Slipway, engine: docker.DockerClient, instance_variables: None) -> Iterator[None]:
    """After each test: no worker, no container, nothing half made, no slot, no run that goes on, one of each alias."""
    yield
    assert workers_of(slipway.home) == {}
    label = f"slipway.home={home_digest(slipway.home)}"
    assert engine.containers.list(all=True, filters={"label": label}) == []
    assert list((slipway.home / "artifacts" / ".making").iterdir()) == []
    assert list((slipway.home / "dagster" / "alive").iterdir()) == []
    with open_instance(Settings.read(dict(slipway.variables))) as instance:
        assert instance.event_log_storage.get_concurrency_info("gpu").active_run_ids == set()
        assert [run for run in instance.get_runs() if not run.is_finished] == []
    for versions in slipway.aliases().values():
        held = [alias for aliases in versions.values() for alias in aliases]
        assert len(held) == len(set(held))
        assert {"candidate", "champion"} <= set(held)


def kill(processes: dict[int, str], what: str = "") -> None:
    """Kill those of the processes whose command has ``what`` in it."""
    found = [pid for pid, command in processes.items() if what in command]
    assert found, what
    for pid in found:
        with contextlib.suppress(ProcessLookupError):  # died of another's death
            os.kill(pid, signal.SIGKILL)


def kill_everything(home: Path) -> None:
    """As when the machine goes: also what was being started just then, as the daemon renews its code server."""
    deadline = time.monotonic() + 30
    while processes := processes_of(home):
        kill(processes)
        assert time.monotonic() < deadline, processes
        time.sleep(0.05)


def kill_the_daemon(home: Path) -> None:
    """The other servers can't go on without it: they are ended, and whatever they started."""
    kill(processes_of(home), "dagster._daemon")


def cut_off(slipway: Slipway, ui: Ui, stage: str) -> str:
    """Drop what a stage of the release has made, launch it, and return its run once it is in the middle of that."""
    made = forget(slipway, stage)
    run_id = ui.launch("gptq")
    drafts = slipway.home / "artifacts" / ".making"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not list(drafts.glob(f"{made}-*")):
        assert time.monotonic() < deadline, ui.status(run_id)
        time.sleep(0.002)
    return run_id


def comes_to_its_end(ui: Ui, run_id: str) -> None:
    """Wait until the run has gone well after all, or the daemon has taken it up by itself, once, and that went well."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while ui.status(run_id) != "SUCCESS":
        runs = ui(RUNS)["runsOrError"]["results"]
        again = [run for run in runs if {"key": "dagster/parent_run_id", "value": run_id} in run["tags"]]
        if again and again[0]["status"] in {"SUCCESS", "FAILURE", "CANCELED"}:
            assert [run["status"] for run in again] == ["SUCCESS"]
            break
        assert time.monotonic() < deadline, runs
        time.sleep(0.5)


def promoted_at_most_once(slipway: Slipway, before: dict[str, Any]) -> None:
    assert len(slipway.aliases()["demo-gptq"]) - len(before["demo-gptq"]) <= 1


def test_a_killed_worker_fails_its_run_which_goes_on_from_there_when_it_is_launched_again(
    slipway: Slipway, ui: Callable[[], Ui]
) -> None:
    running = ui()
    for stage in ("layers", "load"):  # an evaluation's, the load generator
        run_id = cut_off(slipway, running, stage)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not workers_of(slipway.home):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        kill(workers_of(slipway.home))
        assert running.wait(run_id, seconds=PATIENCE_SECONDS) == "FAILURE"
    assert running.wait(running.launch("gptq"), seconds=PATIENCE_SECONDS) == "SUCCESS"


def test_a_killed_quantizer_goes_on_at_the_next_release_and_ends_with_the_same_bytes(slipway: Slipway) -> None:
    whole = made_by(slipway, "quantized")
    forget(slipway, "quantized")
    running = slipway.start("release", "demo", "--scheme", "gptq")
    drafts, deadline = slipway.home / "artifacts" / ".making", time.monotonic() + PATIENCE_SECONDS
    while not list(drafts.glob("quantized-*/scratch/finished/layer-00001")):
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.02)
    kill(workers_of(slipway.home))
    assert running.wait() == 1
    done = slipway("release", "demo", "--scheme", "gptq")
    assert done.returncode == 0, done.stderr
    assert "of 4 layers were finished before a run was cut off: they are taken over" in done.stderr
    assert made_by(slipway, "quantized").digest == whole.digest


def test_a_run_whose_process_is_killed_is_taken_up_by_the_daemon(slipway: Slipway, ui: Callable[[], Ui]) -> None:
    running = ui()
    for stage in ("image", "scan", "release"):
        before = slipway.aliases()
        run_id = cut_off(slipway, running, stage)
        kill(processes_of(slipway.home), "multiprocessing.spawn")
        comes_to_its_end(running, run_id)
        promoted_at_most_once(slipway, before)
    wait_for_burial(slipway)


def wait_for_burial(slipway: Slipway) -> None:
    """Wait for the tick that sees to what a killed process has left."""
    alive: Path = slipway.home / "dagster" / "alive"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while list(alive.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.parametrize(
    ("end", "stages"),
    [(kill_the_daemon, ("scan", "release")), (kill_everything, ("image", "release"))],
    ids=["the daemon", "everything"],
)
def test_what_was_cut_off_is_taken_up_after_the_restart(
    slipway: Slipway, ui: Callable[[], Ui], end: Callable[[Path], None], stages: tuple[str, ...]
) -> None:
    running = ui()
    for stage in stages:
        before = slipway.aliases()
        run_id = cut_off(slipway, running, stage)
        end(slipway.home)
        assert running.process.wait(60) != 0
        assert processes_of(slipway.home) == {}
        running = ui()
        comes_to_its_end(running, run_id)
        promoted_at_most_once(slipway, before)
