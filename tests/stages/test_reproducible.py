"""One image, one digest: whoever makes it, wherever and whenever, and where it doesn't match, what differs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from containers.engine.engine import install_packages
from containers.image import build, profile
from containers.image.base import ensure_base
from containers.scan.trivy import engine_variables
from homes import SLIPWAY
from pipeline.settings import Settings
from stages.test_image import DEMO, cut_down

BUILD = """
import getpass, json, os, sys, time
from pathlib import Path
import docker
from containers.image import build as image; from containers.image import profile
folder, base = Path(sys.argv[1]), sys.argv[2]
client = docker.DockerClient(base_url=os.environ["DOCKER_HOST"])
small = profile.RuntimeProfile.model_validate_json((folder / "profile.json").read_text())
small = small.model_copy(update={"folder": folder})
record = image.build_image(
    client, small, folder / "checkpoint", name="demo-awq", served_name="demo", model_digest="sha256:" + "a" * 64,
    home=folder / "home", progress=lambda line: None, base=base,
)
print(json.dumps({"digest": record.digest, "id": record.image_id, "user": os.getuid(), "time": time.time(),
                  "where": image.__file__}))
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user can enter; pytest's own is its owner's alone."""
    folder = Path(tempfile.mkdtemp(prefix="elsewhere-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def prepared(folder: Path, small: profile.RuntimeProfile, machine: Settings, owner: int, mode: int) -> Path:
    """A checkout of its own, and a home, a profile and a checkpoint in it, that belong to ``owner``."""
    root = Path(__file__).parents[2]
    for package in ("containers", "registry"):
        shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    ours = "pipeline/compatibility/safetensors_headers.py"  # which the loader of the runtimes imports
    (folder / ours).parent.mkdir(parents=True)
    shutil.copy(root / ours, folder / ours)
    shutil.copytree(DEMO, folder / "checkpoint")
    (folder / "home").mkdir()
    (folder / "home" / "wheels").symlink_to(machine.home / "wheels")
    shutil.copy(small.lock_path, folder)
    (folder / "profile.json").write_text(small.model_dump_json())
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            os.chown(path, owner, owner)
            path.chmod(0o755 if path.is_dir() else mode)
    return folder


def test_two_builds_in_other_folders_by_other_users_a_day_apart_are_one_image(
    engine: docker.DockerClient, machine: Settings, open_folder: Path, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.xfail("only root can be another user")
    install_packages(["faketime"], print)
    base = ensure_base(engine, profile.load("vllm-cpu"), machine.home, print).reference
    small = cut_down(tmp_path / "profile", "vllm-cpu")
    host = engine_variables(engine)["DOCKER_HOST"]
    group = Path(host.removeprefix("unix://")).stat().st_gid
    told = []
    for name, user, mode, clock in (("one", 0, 0o644, "2026-01-01 12:00:00"), ("two/deep", 1001, 0o600, "+1 day")):
        folder = prepared(open_folder / name, small, machine, user, mode)
        done = subprocess.run(
            ["faketime", "-f", clock, "setpriv", f"--reuid={user}", f"--regid={user}", f"--groups={group}",
             sys.executable, "-c", BUILD, str(folder), base],
            env={"PATH": os.environ["PATH"], "DOCKER_HOST": host, "PYTHONPATH": str(folder), "HOME": str(folder),
                 "TZ": "Asia/Tokyo" if user else "UTC"},
            cwd=folder, capture_output=True, text=True, check=False, umask=0o077 if user else 0o022,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        told.append(json.loads(done.stdout))
        engine.images.remove(told[-1]["id"], force=True)
    one, two = told
    assert (one["user"], two["user"]) == (0, 1001)
    assert two["time"] - one["time"] > 86_400
    assert Path(one["where"]).parents[1] != Path(two["where"]).parents[1]
    assert (one["digest"], one["id"]) == (two["digest"], two["id"])


def test_a_base_made_twice_is_one_layer(machine: Settings, tmp_path: Path) -> None:
    from containers.image import base as bases  # noqa: PLC0415 - its private parts, here alone

    recipe = profile.DebianRecipe(suite="bookworm", packages=("python3-minimal",))
    made = []
    for name in ("a", "b"):
        home = tmp_path / name
        made.append(bases._bootstrapped(recipe, "k", home, bases.store_of(home), print).digest)
    assert made[0] == made[1]


def test_the_command_says_what_differs(
    engine: docker.DockerClient, machine: Settings, base: str, tmp_path: Path
) -> None:
    small = cut_down(tmp_path / "profile", "vllm-cpu")
    identities = []
    for number in (1, 2):
        checkpoint = tmp_path / str(number)
        shutil.copytree(DEMO, checkpoint)
        if number == 2:
            (checkpoint / "tokenizer_config.json").write_text('{"changed": true}')
            (checkpoint / "generation_config.json").chmod(0o755)
        record = build.build_image(
            engine, small, checkpoint, name=f"test-diff-{number}", served_name="demo", home=machine.home,
            model_digest="sha256:" + str(number) * 64, progress=print, base=base,
        )  # fmt: skip
        identities.append(record.image_id)
    environment = {**os.environ, **engine_variables(engine), "SLIPWAY_HOME": str(machine.home)}

    def diff(*images: str) -> tuple[int, list[dict[str, str]]]:
        command = [SLIPWAY, "image", "diff", *images, "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, json.loads(done.stdout)["differences"]

    status, found = diff(*identities)
    assert status == 1
    words = {(item["where"].split(" ")[0], item["what"]) for item in found}
    assert ("settings", "config.Labels.slipway.model.digest") in words
    assert ("layer", "model/tokenizer_config.json: sha256") in words
    assert ("layer", "model/generation_config.json: mode") in words
    assert not [what for _, what in words if "safetensors" in what or "opt/venv" in what]
    assert diff(identities[0], identities[0]) == (0, [])
    for each in identities:
        engine.images.remove(each, force=True)


@pytest.fixture(scope="module")
def base(engine: docker.DockerClient, machine: Settings) -> str:
    """The stand-in base: Debian's packages and Python, made here."""
    return ensure_base(engine, profile.load("vllm-cpu"), machine.home, print).reference
