"""The demo, released once for all tests of the whole release; each worker has that release in a home of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from homes import Slipway, make_home
from pipeline.settings import Settings
from shared import made_once


@pytest.fixture(scope="session")
def first_release(tmp_path_factory: pytest.TempPathFactory, machine: Settings) -> Path:
    """A folder with the home of the first release and what `slipway release demo --json` printed; only read."""

    def release(folder: Path) -> None:
        done = Slipway(make_home(folder / "home", machine))("release", "demo", "--json")
        assert done.returncode == 0, done.stderr
        (folder / "released.json").write_text(done.stdout)

    return made_once(tmp_path_factory, "released", release)


@pytest.fixture(scope="session")
def released(first_release: Path) -> dict[str, Any]:
    """What the first `slipway release demo --json` printed."""
    document: dict[str, Any] = json.loads((first_release / "released.json").read_text())
    return document


@pytest.fixture(scope="session")
def slipway(first_release: Path, tmp_path_factory: pytest.TempPathFactory, machine: Settings) -> Slipway:
    """The command in this worker's home: the first one's artifacts and key, so that its release takes seconds."""
    slipway = Slipway(make_home(tmp_path_factory.mktemp("e2e") / "home", machine))
    for name in ("artifacts", "keys"):
        shutil.copytree(first_release / "home" / name, slipway.home / name, symlinks=True)
    done = slipway("release", "demo", "--json")
    assert done.returncode == 0, done.stderr
    return slipway
