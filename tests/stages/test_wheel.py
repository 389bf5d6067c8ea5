"""The installed wheels: a `slipway` that works in a folder of its user, away from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from checkout import CHECKOUT
from pipeline.resources import IN_WHEEL

UV = Path(sys.executable).parent / "uv"
PINS = CHECKOUT / "requirements"
DISTRIBUTIONS = {".": "slipway", "registry": "slipway_registry"}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel of each distribution."""
    folder = tmp_path_factory.mktemp("wheels")
    held: list[str | Path] = ["--require-hashes", "--build-constraints", PINS / "hatchling.txt"]
    for source in DISTRIBUTIONS:
        subprocess.run([UV, "build", "-q", "--wheel", CHECKOUT / source, *held, "-o", folder], check=True)
    return {name: next(folder.glob(f"{name}-*.whl")) for name in DISTRIBUTIONS.values()}


@pytest.fixture(scope="module")
def installed(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with both wheels and the pinned versions of what they need."""
    environment = tmp_path_factory.mktemp("installed") / "venv"
    python = environment / "bin" / "python"
    install: list[str | Path] = [UV, "pip", "install", "-q", "--python", python]
    subprocess.run([UV, "venv", "-q", "--python", sys.executable, environment], check=True)
    subprocess.run([*install, "--require-hashes", "-r", PINS / "orchestrator.txt"], check=True)
    # Offline: whatever the wheels need beside the pins would be missing.
    subprocess.run([*install, "--offline", *wheels.values()], check=True)
    return environment


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A user's folder with a copy of the demo, and with folders that are named as the packages are."""
    shutil.copytree(CHECKOUT / "models", tmp_path / "workspace" / "models")
    for name in ("pipeline", "evals", "containers", "registry"):
        package = tmp_path / "workspace" / name
        package.mkdir()
        (package / "__init__.py").write_text("raise ImportError('not this package')\n")
    return tmp_path / "workspace"


def slipway(installed: Path, workspace: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(workspace.parent), **variables}
    command: list[str | Path] = [installed / "bin" / "slipway", *arguments]
    return subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, check=False)


def test_no_file_is_in_both_wheels_or_beside_the_packages(wheels: dict[str, Path]) -> None:
    names = {
        name: {path for path in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in path}
        for name, wheel in wheels.items()
    }
    assert not names["slipway"] & names["slipway_registry"]
    tops = {path.split("/")[0] for paths in names.values() for path in paths}
    assert tops == {"pipeline", "evals", "containers", "registry"}


def test_the_wheels_have_every_file_of_the_packages_and_the_pins(wheels: dict[str, Path]) -> None:
    held = {path for wheel in wheels.values() for path in zipfile.ZipFile(wheel).namelist()}
    found = {
        place.relative_to(CHECKOUT).as_posix(): place
        for folder in ("pipeline", "evals", "containers", "registry", "requirements")
        for place in (CHECKOUT / folder).rglob("*")
        if place.is_file() and "__pycache__" not in place.parts
    }
    # What builds and runs the registry's own server and wheel is not a part of it.
    used = {name for name, place in found.items() if place.parent.name != "registry" or place.suffix == ".py"}
    beside = {name for name in used if name.startswith("requirements/")} | {"dagster.yaml"}
    assert (used - beside) | {f"{IN_WHEEL}/{name}" for name in beside} <= held


def test_every_dependency_is_installed_and_none_conflicts(installed: Path) -> None:
    done = subprocess.run(
        [UV, "pip", "check", "--python", installed / "bin" / "python"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_model_of_the_current_folder_is_planned_and_state_is_the_users(installed: Path, workspace: Path) -> None:
    planned = slipway(installed, workspace, "plan", "demo", "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["model"] == "demo"
    by_path = slipway(installed, workspace, "plan", "models/demo.yaml", "--json", SLIPWAY_MODELS="elsewhere")
    assert by_path.returncode == 0, by_path.stderr
    found = json.loads(slipway(installed, workspace, "doctor", "--json").stdout)
    assert f"{workspace.parent}/.local/share/slipway" in json.dumps(found)
    assert {path.name for path in workspace.iterdir()} == {"models", "pipeline", "evals", "containers", "registry"}


def test_the_asset_graph_and_the_instance_are_loaded_from_the_wheel(installed: Path, workspace: Path) -> None:
    program = """
from pipeline.orchestration.instance import open_instance
from pipeline.settings import Settings
from pipeline.definitions import defs
with open_instance(Settings.read()) as instance:
    print(instance.run_retries_enabled, len(list(defs.resolve_all_asset_specs())) > 0)
"""
    environment = {"PATH": os.environ["PATH"], "HOME": str(workspace.parent)}
    done = subprocess.run(
        [installed / "bin" / "python", "-P", "-c", program],
        cwd=workspace, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "True True\n", done.stderr  # dagster.yaml turns retries on; Dagster has them off


def test_the_registrys_command_comes_along(installed: Path, workspace: Path) -> None:
    command: list[str | Path] = [installed / "bin" / "slipway-registry", "pull", "--help"]
    done = subprocess.run(command, cwd=workspace, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
