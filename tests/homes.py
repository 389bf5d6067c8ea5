"""Homes for tests: a $SLIPWAY_HOME of their own on what the machine already has, and the command in one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from containers.engine.engine import connect
from containers.scan.trivy import engine_variables
from pipeline.settings import Settings
from pipeline.store.artifacts import Artifact, Store
from pipeline.store.materializations import MaterializationIndex
from registry import catalog

DEMO = Path(__file__).parent.parent / "models" / "demo"
FIRST_CALLS = Path(__file__).with_name("first_calls.py")
# What all homes of a machine have in common.
OF_THE_MACHINE = {"SLIPWAY_LOCKS", "SLIPWAY_CPU_ISA"}
# What `drift` is made of, each by a worker of its own.
_PARTS = {"drift": ("answers", "candidate"), "layers": ("layers", "layers")}
# A port of loopback that the engine chooses, which docker's types do not know.
FREE_PORT: Any = ("127.0.0.1", None)
SLIPWAY = str(Path(sys.executable).parent / "slipway")


def make_home(folder: Path, machine: Settings) -> dict[str, str]:
    """Prepare an empty $SLIPWAY_HOME that borrows the machine's environments, wheels, layers and engine.

    Returns the environment in which `slipway` uses it.
    """
    folder.mkdir(parents=True)
    for name in ("envs", "wheels", "images", "trivy"):
        (machine.home / name).mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(machine.home / name)
    client = connect(machine.docker_host, machine.home)
    engine = engine_variables(client)
    client.close()
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in OF_THE_MACHINE or not name.startswith(("SLIPWAY_", "MLFLOW_"))
    }
    return {**kept, "SLIPWAY_HOME": str(folder), **engine}


@dataclass(frozen=True)
class Slipway:
    """The command, in a home of its own."""

    variables: Mapping[str, str]

    @property
    def home(self) -> Path:
        return Path(self.variables["SLIPWAY_HOME"])

    def __call__(self, *words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.variables, **variables}
        return subprocess.run([SLIPWAY, *map(str, words)], env=environment, capture_output=True, text=True, check=False)

    def start(self, *words: str | Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [SLIPWAY, *map(str, words)],
            env=dict(self.variables),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def aliases(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """Every release line's versions with their aliases."""
        uri = Settings.read(dict(self.variables)).tracking_uri
        return {name: {v.version: v.aliases for v in catalog.current(uri, name)} for name in catalog.names(uri)}


def made_by(slipway: Slipway, stage: str, release: str = "demo|gptq") -> Artifact:
    """What a stage of one release has made last."""
    settings = Settings.read(dict(slipway.variables))
    place = MaterializationIndex(settings).read(stage, release)
    assert place is not None
    made = Store(settings.home / "artifacts").find(*place)
    assert made is not None
    return made


def forget(slipway: Slipway, stage: str, release: str = "demo|gptq") -> str:
    """Drop what a stage of one release has made, and nothing else; return by what name the store keeps it.

    Of `drift` that is what the candidate answered: all else of it is made of that in a second, and of what its layers
    lost, which go as `layers`.
    """
    made = made_by(slipway, "drift" if stage == "layers" else stage, release)
    shutil.rmtree(made.folder.parent)
    if stage not in _PARTS:
        return made.stage
    kept, part = _PARTS[stage]
    answered = Store(slipway.home / "artifacts").with_digest(kept, made.inputs[part])
    assert answered is not None
    shutil.rmtree(answered.folder.parent)
    return answered.stage
