"""Pinned environments of workers, each made once.

An environment is made from ``requirements/<name>.txt`` on first use and named after the digest of its pins. Torch is
installed first and pinned only by version, because its build depends on the machine (see ``requirements/README.md``).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from pipeline.errors import WorkerFailed
from pipeline.resources import PACKAGES, REQUIREMENTS
from pipeline.settings import Settings
from registry.digests import digest_file, digest_json
from registry.file_locks import locked
from registry.progress import Progress

ENVIRONMENTS = ("autoawq", "gptqmodel", "autogptq", "llmcompressor", "peft", "lm-eval", "aiperf", "gateway")
# Modules that are copied into every environment, by their name there.
_HARNESS = {
    "slipway_worker.py": Path(__file__).with_name("slipway_worker.py"),
    "slipway_counting.py": PACKAGES / "registry" / "counting.py",
}
_EXACT = PACKAGES / "containers" / "runtimes" / "slipway_torch.py"
_TAIL_LINES = 20


def pins_digest(environment: str) -> str:
    """``sha256:…`` over the files that determine what is installed in an environment."""
    return digest_json({path.name: digest_file(path) for path in _pins(environment)})


def pinned_version(distribution: str) -> str:
    """The pinned version of the distribution that an environment is named after."""
    names = {"autogptq": "auto-gptq"}
    pattern = re.compile(rf"^{names.get(distribution, distribution)}==([^ ]+)", re.MULTILINE)
    found = pattern.search((REQUIREMENTS / f"{distribution}.txt").read_text())
    if found is None:
        raise WorkerFailed(f"requirements/{distribution}.txt does not pin {distribution}")
    return found[1]


def environment_folder(environment: str, home: Path) -> Path:
    """The folder of an environment, which may not be made yet; see `ensure_environment`."""
    return home / "envs" / f"{environment}-{pins_digest(environment)[7:19]}"


def ensure_environment(environment: str, settings: Settings, progress: Progress) -> Path:
    """Make the environment if it does not exist, and return its folder.

    Raises:
        WorkerFailed: the installer failed; the message ends with its last output.
    """
    folder = environment_folder(environment, settings.home)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(folder.name + ".lock")):
        if not folder.is_dir():
            progress(f"making the {environment} environment (once; takes a minute or two if nothing is cached)")
            _install(environment, folder, settings)
    return folder


def install_harness(environment: str, site: Path) -> None:
    """Copy what every worker script imports into an environment's folder of packages."""
    for name, path in _HARNESS.items():
        shutil.copyfile(path, site / name)
    if _needs_torch(environment):
        shutil.copyfile(_EXACT, site / _EXACT.name)
        (site / _EXACT.with_suffix(".pth").name).write_text(f"import {_EXACT.stem}\n")


def _pins(environment: str) -> list[Path]:
    """The files that determine what is installed."""
    pins = [REQUIREMENTS / f"{environment}.txt", REQUIREMENTS / "build.txt", *_HARNESS.values()]
    return [REQUIREMENTS / "torch.txt", _EXACT, *pins] if _needs_torch(environment) else pins


def _needs_torch(environment: str) -> bool:
    return "# torch" in (REQUIREMENTS / f"{environment}.in").read_text().splitlines()


def _install(environment: str, folder: Path, settings: Settings) -> None:
    from uv import find_uv_bin  # noqa: PLC0415 - a machine whose environments are there needs no installer

    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    python = str(beside / "bin" / "python")
    base = str(Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")
    steps = [["venv", "--relocatable", "--python", base, str(beside)]]
    if _needs_torch(environment):
        steps.append(["pip", "install", "--python", python, "-r", str(REQUIREMENTS / "torch.txt")])
    pinned = str(REQUIREMENTS / f"{environment}.txt")
    hashed = ["--no-deps", "--require-hashes", "--require-build-hashes"]
    hashed += ["--build-constraints", str(REQUIREMENTS / "build.txt")]
    steps.append(["pip", "install", "--python", python, *hashed, "-r", pinned])
    variables = dict(settings.installer_environment)
    # uv has another name for pip's folder of wheels.
    if "PIP_FIND_LINKS" in variables:
        variables.setdefault("UV_FIND_LINKS", variables["PIP_FIND_LINKS"])
    for step in steps:
        done = subprocess.run([find_uv_bin(), *step], env=variables, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(beside, ignore_errors=True)
            tail = "\n".join(done.stderr.splitlines()[-_TAIL_LINES:])
            raise WorkerFailed(f"can't make the {environment} environment (uv {step[0]} failed):\n{tail}")
    (site,) = beside.glob("lib/python*/site-packages")
    install_harness(environment, site)
    beside.rename(folder)
