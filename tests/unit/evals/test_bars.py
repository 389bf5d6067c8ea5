"""What lm-eval takes for tqdm's bars reports counts instead."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from pipeline.workers import slipway_worker
from registry import counting


@pytest.fixture
def checkpoints(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as the worker has it, with the harness under its own names; nothing is too quick to be told."""
    from evals.drift import images, packed  # noqa: PLC0415 - beside it in the worker

    monkeypatch.setattr(counting, "FIRST_SECONDS", 0.0)
    monkeypatch.setitem(sys.modules, "images", images)
    monkeypatch.setitem(sys.modules, "packed", packed)
    monkeypatch.setitem(sys.modules, "slipway_worker", slipway_worker)
    monkeypatch.setitem(sys.modules, "slipway_counting", counting)
    from evals.drift import checkpoints as found  # noqa: PLC0415 - only with the harness in place

    return found


def test_a_bar_that_is_told_and_one_that_is_gone_through(checkpoints: ModuleType) -> None:
    lines: list[str] = []
    bar = checkpoints._bars(lines.append)
    told = bar(total=3, disable=False, desc="asking")
    told.update(3)
    told.close()
    assert list(bar(["a", "b"], desc="windows")) == ["a", "b"]
    assert [line.partition(" after")[0] for line in lines if "asking" in line][-1] == "asking: 3 of 3 prompts"
    assert [line.partition(" after")[0] for line in lines if "windows" in line][-1] == "windows: 2 of 2 prompts"


def test_a_bar_that_is_not_wanted_tells_nothing(checkpoints: ModuleType) -> None:
    lines: list[str] = []
    assert list(checkpoints._bars(lines.append)(["a"], disable=True, desc="x")) == ["a"]
    assert list(checkpoints._bars(lines.append)([], desc="x")) == []
    assert lines == []
