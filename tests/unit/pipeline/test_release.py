"""Releasing from the command line, with small programs that stand in for a scheme's run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import PlanError
from pipeline.orchestration.release import release, sweep
from pipeline.orchestration.release_events import GateJudged, GateSummary, RunEnded, RunEvent, StageDone
from pipeline.settings import Settings
from pipeline.stages.metadata import ReleasedVersion

STAGE = StageDone(name="source", seconds=1.5, cached=False, worker_seconds=1.0)
GATE = GateJudged(name="drift", status="fail", reason="too much lost", blocks=True)
RELEASED = ReleasedVersion(
    outcome="promoted", version="3", aliases=("candidate", "champion"), manifest_digest="sha256:ab",
    image="x@sha256:cd", measured={"size_ratio": 0.4},
)  # fmt: skip
GOOD = RunEnded(outcome="promoted", release=RELEASED)
SIZES = [("source", 1000), ("quantized", 400)]
REFUSED = RunEnded(outcome="refused", error="drift: too much lost")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.read({"SLIPWAY_HOME": str(tmp_path / "home"), "DOCKER_HOST": f"unix://{tmp_path}/none.sock"})


class Heard:
    """Keeps what is shown."""

    def __init__(self) -> None:
        self.events: list[tuple[str, RunEvent]] = []

    def __call__(self, scheme: str, event: RunEvent) -> None:
        self.events.append((scheme, event))


def stand_in(tmp_path: Path, code: str) -> list[str]:
    """A program that stands in for `pipeline.orchestration.run`: it is given a model's file and a scheme."""
    path = tmp_path / "stand_in.py"
    path.write_text(f"import json, os, signal, sys, time\nmodel, scheme = sys.argv[1:]\n{code}")
    return [sys.executable, str(path)]


def say(*events: RunEvent) -> str:
    return "".join(f"print({event.model_dump_json()!r}, flush=True)\n" for event in events)


def test_endings_are_gathered_in_the_order_asked_for(tmp_path: Path, settings: Settings) -> None:
    program = stand_in(tmp_path, "time.sleep(0.3 if scheme == 'awq' else 0)\n" + say(STAGE, GOOD))
    heard = Heard()
    first, second = release(tmp_path / "m.yaml", ["awq", "gptq"], settings, heard, program)
    assert (first.scheme, second.scheme) == ("awq", "gptq")
    assert first.model_dump(mode="json") == {
        "scheme": "awq", "outcome": "promoted", "version": "3", "aliases": ["candidate", "champion"],
        "manifest_digest": "sha256:ab", "image": "x@sha256:cd",
        "stages": [{"name": "source", "seconds": 1.5, "cached": False, "worker_seconds": 1.0}],
        "gates": [], "measured": {"size_ratio": 0.4}, "variants": {}, "weights": {}, "error": None,
    }  # fmt: skip
    # Side by side: the quick one's events came first.
    assert [scheme for scheme, _ in heard.events] == ["gptq", "gptq", "awq", "awq"]
    assert list((settings.home / "logs").iterdir()) == []


def test_a_refusal_is_told_with_its_gates(tmp_path: Path, settings: Settings) -> None:
    (entry,) = release(tmp_path / "m.yaml", ["awq"], settings, Heard(), stand_in(tmp_path, say(GATE, REFUSED)))
    assert entry.outcome == "refused"
    assert entry.gates == (GateSummary(name="drift", status="fail", reason="too much lost", blocks=True),)
    assert (entry.version, entry.aliases, entry.measured) == (None, (), {})


def test_a_refusal_keeps_all_that_was_measured(tmp_path: Path, settings: Settings) -> None:
    metrics = {"cloze.drop": 0.031, "code.drop": 0.01, "text.increase": 0.056, "items": 400.0}
    gate = GATE.model_copy(update={"metrics": metrics})
    sizes = [STAGE.model_copy(update={"name": name, "size_bytes": size}) for name, size in SIZES]
    (entry,) = release(tmp_path / "m.yaml", ["awq"], settings, Heard(), stand_in(tmp_path, say(*sizes, gate, REFUSED)))
    assert entry.measured == {
        "accuracy_change": -0.031, "bits_per_byte_change": 0.056, "size_bytes": 400.0, "size_ratio": 0.4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print('out of cheese', file=sys.stderr); sys.exit(7)", ["ended with status 7", "out of cheese"]),
        ("os.kill(os.getpid(), signal.SIGKILL)", ["was killed"]),
        ("raise RuntimeError('boom')", ["RuntimeError: boom"]),
        ("", ["ended with status 0"]),
    ],
    ids=["status", "killed", "traceback", "silent"],
)
def test_a_run_that_ends_without_a_word_has_failed_and_its_last_words_are_shown(
    tmp_path: Path, settings: Settings, code: str, words: list[str]
) -> None:
    heard = Heard()
    (entry,) = release(tmp_path / "m.yaml", ["awq"], settings, heard, stand_in(tmp_path, say(STAGE) + code))
    assert entry.outcome == "failed"
    assert [stage.name for stage in entry.stages] == ["source"]
    (log,) = (settings.home / "logs").iterdir()
    assert all(word in str(entry.error) for word in [*words, str(log)])
    assert heard.events[-1][1] == RunEnded(outcome="failed", error=entry.error)


def test_what_a_library_prints_is_no_event(tmp_path: Path, settings: Settings) -> None:
    code = "print('hello'); print(5); print('[1]'); print('{\"x\": 1}')\n" + say(GOOD)
    heard = Heard()
    (entry,) = release(tmp_path / "m.yaml", ["awq"], settings, heard, stand_in(tmp_path, code))
    assert entry.outcome == "promoted"
    assert len(heard.events) == 1


def test_one_scheme_that_fails_leaves_the_other_alone(tmp_path: Path, settings: Settings) -> None:
    program = stand_in(tmp_path, "if scheme == 'awq': sys.exit(1)\n" + say(GOOD))
    entries = release(tmp_path / "m.yaml", ["awq", "gptq"], settings, Heard(), program)
    assert [entry.outcome for entry in entries] == ["failed", "promoted"]


ONCE_TOLD = (
    "from pathlib import Path\nassert sys.stdin.readline() == 'go\\n'\nPath(__file__).with_name(scheme).touch()\n"
)


def test_no_run_begins_before_what_comes_first_is_done(tmp_path: Path, settings: Settings) -> None:
    def first() -> dict[str, list[RunEvent]]:
        assert not [name for name in ("awq", "gptq") if (tmp_path / name).exists()]
        return {}

    program = stand_in(tmp_path, ONCE_TOLD + say(GOOD))
    entries = release(tmp_path / "m.yaml", ["awq", "gptq"], settings, Heard(), program, first)
    assert [entry.outcome for entry in entries] == ["promoted", "promoted"]


def test_what_there_is_to_tell_without_a_run_is_told_and_no_run_begins(tmp_path: Path, settings: Settings) -> None:
    up_to_date = RunEnded(outcome="up-to-date", release=RELEASED.model_copy(update={"outcome": "up-to-date"}))
    passed = GATE.model_copy(update={"status": "pass", "blocks": False})
    events: list[RunEvent] = [STAGE.model_copy(update={"cached": True}), passed, up_to_date]
    heard = Heard()
    program = stand_in(tmp_path, ONCE_TOLD + say(GOOD))
    entries = release(tmp_path / "m.yaml", ["awq", "gptq"], settings, heard, program, lambda: {"awq": events})
    assert [entry.outcome for entry in entries] == ["up-to-date", "promoted"]
    assert [stage.cached for stage in entries[0].stages] == [True]
    assert [gate.status for gate in entries[0].gates] == ["pass"]
    assert [event for scheme, event in heard.events if scheme == "awq"] == events
    assert not (tmp_path / "awq").exists()
    assert list((settings.home / "logs").iterdir()) == []


def test_no_run_begins_where_what_comes_first_refuses(tmp_path: Path, settings: Settings) -> None:
    def refuse() -> dict[str, list[RunEvent]]:
        raise PlanError("does not fit")

    program = stand_in(tmp_path, ONCE_TOLD + say(GOOD))
    with pytest.raises(PlanError, match="does not fit"):
        release(tmp_path / "m.yaml", ["awq"], settings, Heard(), program, refuse)
    assert not (tmp_path / "awq").exists()
    assert list((settings.home / "logs").iterdir()) == []


# A command line in small: releases with a stand-in until it is interrupted.
PARENT = """
import sys
from pathlib import Path
from pipeline.orchestration.release import release
from pipeline.settings import Settings

try:
    release(Path("m.yaml"), ["awq", "gptq"], Settings.read(), lambda *_: None, sys.argv[1:])
except KeyboardInterrupt:
    sys.exit(130)
"""
# Says who it is, then waits; on SIGINT it tidies up as a run does.
WAITING = """
from pathlib import Path
folder = Path(__file__).parent
(folder / f"{scheme}.part").write_text(str(os.getpid()))
(folder / f"{scheme}.part").rename(folder / f"{scheme}.pid")
try:
    time.sleep(60)
except KeyboardInterrupt:
    (folder / f"{scheme}.tidied").touch()
"""


def interrupted(tmp_path: Path, settings: Settings, number: signal.Signals) -> tuple[int, list[int]]:
    """Start a parent with two waiting runs, send it a signal, and return its status and the runs' process ids."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *stand_in(tmp_path, WAITING)],
        env={"SLIPWAY_HOME": str(settings.home), "PATH": os.environ["PATH"]},
    )
    files = [tmp_path / "awq.pid", tmp_path / "gptq.pid"]
    wait_until(lambda: all(file.exists() for file in files))
    parent.send_signal(number)
    return parent.wait(20), [int(file.read_text()) for file in files]


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_ctrl_c_lets_the_runs_tidy_up_and_ends_them(tmp_path: Path, settings: Settings) -> None:
    status, runs = interrupted(tmp_path, settings, signal.SIGINT)
    assert status == 130
    assert (tmp_path / "awq.tidied").exists()
    assert (tmp_path / "gptq.tidied").exists()
    assert all(map(is_gone, runs))


def test_a_parent_that_is_killed_takes_its_runs_along(tmp_path: Path, settings: Settings) -> None:
    _, runs = interrupted(tmp_path, settings, signal.SIGKILL)
    wait_until(lambda: all(map(is_gone, runs)))


def test_sweep_drops_what_was_half_made_and_needs_no_engine(settings: Settings) -> None:
    artifacts = settings.home / "artifacts"
    half = artifacts / ".making" / "quantized-abc"
    half.mkdir(parents=True)
    (artifacts / "quantized").mkdir()
    sweep(settings)
    assert not half.exists()
    sweep(settings)
