"""What a deployment installs: small, quick to start, without anything heavy; and a container of it that pulls."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import docker
import pytest
from real_server import mlflow_server
from release_folder import make_release

from containers.image.base import ensure_base
from containers.image.profile import load
from pipeline.settings import Settings
from registry import verify
from registry.promote import promote
from registry.signing import SigningKey, load_or_create_key

CHECKOUT = Path(__file__).parent.parent.parent
UV = Path(sys.executable).parent / "uv"
BUILD: list[str | Path] = [
    UV,
    "build",
    "-q",
    "--wheel",
    CHECKOUT / "registry",
    "--require-hashes",
    "--build-constraints",
]
HEAVY = ("mlflow", "dagster", "torch", "docker", "pandas", "numpy", "pipeline", "evals", "containers", "boto3")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the distribution's wheel, and ``site``: that wheel and its pins, installed."""
    folder = tmp_path_factory.mktemp("light")
    subprocess.run([*BUILD, CHECKOUT / "requirements" / "hatchling.txt", "-o", folder], check=True)
    (wheel,) = folder.glob("*.whl")
    pins = CHECKOUT / "requirements" / "registry.txt"
    install: list[str | Path] = [
        UV,
        "pip",
        "install",
        "-q",
        "--compile-bytecode",
        "--target",
        folder / "site",
        "--python",
        sys.executable,
    ]
    subprocess.run([*install, "--require-hashes", "-r", pins], check=True)
    subprocess.run([*install, "--no-deps", wheel], check=True)
    return folder


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    return load_or_create_key(tmp_path / "keys" / "release.pem")


def test_what_builds_it_is_held_to_its_hashes(tmp_path: Path) -> None:
    pins = (CHECKOUT / "requirements" / "hatchling.txt").read_text()
    (tmp_path / "other.txt").write_text(re.sub(r"sha256:[0-9a-f]{64}", f"sha256:{'0' * 64}", pins))
    (tmp_path / "without.txt").write_text(pins.replace("pluggy", "pluggy-of-another-name"))
    for name in ("other.txt", "without.txt"):
        done = subprocess.run(
            [*BUILD, tmp_path / name, "-o", tmp_path, "--no-cache"], capture_output=True, text=True, check=False
        )
        assert done.returncode != 0
        assert "hash" in done.stderr.lower()
        assert not list(tmp_path.glob("*.whl"))


def test_it_is_small_and_quick_and_brings_nothing_heavy(built: Path) -> None:
    size = sum(path.stat().st_size for path in (built / "site").rglob("*") if path.is_file())
    assert size < 120e6
    script = (
        "import json, sys, time; bare = len(sys.modules); started = time.process_time();"
        "import registry, registry.__main__, registry.server; took = time.process_time() - started;"
        "print(json.dumps([took, len(sys.modules) - bare, sorted({name.split('.')[0] for name in sys.modules})]))"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(built / "site")}
    runs = [
        json.loads(subprocess.check_output([sys.executable, "-S", "-c", script], env=environment, cwd=built))
        for _ in range(3)
    ]
    assert not set(HEAVY) & set(runs[0][2])
    assert min(seconds for seconds, *_ in runs) < 0.5
    assert runs[0][1] < 700


def test_the_container_pulls_as_an_init_container_does(
    built: Path, engine: docker.DockerClient, machine: Settings, key: SigningKey, tmp_path: Path
) -> None:
    base = ensure_base(engine, load("vllm-cpu"), machine.home / "scratch", print).reference
    shutil.copy(CHECKOUT / "registry" / "Dockerfile", built / "Dockerfile")
    image, _ = engine.images.build(path=str(built), buildargs={"BASE": base}, rm=True, forcerm=True)
    assert image.attrs["Config"]["User"] == "65534:65534"
    make_release(tmp_path / "release", key)
    volume, keys = tmp_path / "volume", tmp_path / "public"
    volume.mkdir()
    keys.mkdir()
    (keys / "release.pub").write_bytes(key.public.pem())
    for folder in (tmp_path, *tmp_path.parents):
        if folder.is_relative_to("/tmp") and folder != Path("/tmp"):  # noqa: S108 - pytest's own folders
            folder.chmod(0o755)
    volume.chmod(0o777)
    options = ["--artifacts-destination", str(tmp_path / "server" / "files")]
    try:
        with mlflow_server(tmp_path / "server", f"sqlite:///{tmp_path}/server.db", options, {}) as address:
            promote(tmp_path / "release", address, [key.public])

            def run(name: str, flag: str = "--if-changed") -> bytes:
                return bytes(
                    engine.containers.run(
                        str(image.id),
                        ["pull", name, "/models/demo", flag, "--key", "/keys", "--json"],
                        environment={"MLFLOW_TRACKING_URI": address},
                        volumes={
                            str(volume): {"bind": "/models", "mode": "rw"},
                            str(keys): {"bind": "/keys", "mode": "ro"},
                        },
                        network_mode="host", read_only=True, cap_drop=["ALL"], remove=True,
                    )
                )  # fmt: skip

            told = json.loads(run("demo-awq@champion", "--replace"))
            assert (told["version"], told["already_there"]) == ("1", False)
            assert json.loads(run("demo-awq@champion", "--replace"))["already_there"]
            verify(volume / "demo", [key.public])
            for name, status in (("demo-awq@champion", 5), ("demo-awq@canary", 4)):
                with pytest.raises(docker.errors.ContainerError) as caught:
                    run(name)
                assert caught.value.exit_status == status
    finally:
        engine.images.remove(str(image.id), force=True)
