"""The demo, released once for all tests of the whole release."""

from __future__ import annotations

import json
from typing import Any

import pytest

from homes import Slipway, make_home
from pipeline.settings import Settings


@pytest.fixture(scope="session")
def slipway(tmp_path_factory: pytest.TempPathFactory, machine: Settings) -> Slipway:
    return Slipway(make_home(tmp_path_factory.mktemp("e2e") / "home", machine))


@pytest.fixture(scope="session")
def released(slipway: Slipway) -> dict[str, Any]:
    """What `slipway release demo --json` printed."""
    done = slipway("release", "demo", "--json")
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document
