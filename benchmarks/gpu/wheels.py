"""Chooses and builds the wheels that a GPU machine without a network needs, where there is one.

    python -m benchmarks.gpu.wheels --python python3.12

Writes `.gpu/wheels/new` and, with the older transformers that AutoGPTQ and AutoAWQ need, `.gpu/wheels/old`. Versions
and hashes are those of `requirements/`, in one version each: what GPTQModel shares with llm-compressor it takes in that
one's. The wheels are for the Python that is named, which must be the GPU machine's version, and for this platform.
AutoGPTQ is built without its CUDA kernels. Exits with 1 where all have more than 60 MiB.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.unpack import PYTHON
from pipeline.resources import REQUIREMENTS

LIMIT = 60 << 20
# Of a package that several pin, the first one's version is carried.
ENVIRONMENTS = ("llmcompressor", "gptqmodel", "autoawq", "autogptq")
# What AutoAWQ and AutoGPTQ need in another version than the others.
OLDER = ("transformers", "tokenizers", "huggingface-hub", "datasets")
# What this project's own modules import beyond what the quantizers do.
OURS = ("cffi", "cryptography", "docker", "pycparser")
# A machine with torch is expected to have them; pyarrow alone has 52 MiB.
EXPECTED = frozenset({"jinja2", "markupsafe", "mpmath", "networkx", "numpy", "pandas", "pillow", "pyarrow", "sympy"})
# What nothing imports that runs there: for builds, downloads, other tokenizers, kernels for CPUs.
UNUSED = frozenset(
    {"aiohttp", "frozenlist", "hf-xet", "maturin", "multidict", "ninja", "propcache", "sentencepiece"}
    | {"setuptools", "yarl", "zstandard"}
)
# What a wheel brings that is not Python and is not used: solvers for every platform, and pages.
CUT = {"gekko": ("gekko/bin/", "gekko/static/")}


def main() -> None:
    """Make both sets, and print each wheel's size and all of them together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="an interpreter of the GPU machine's version")
    parser.add_argument("--installed", type=Path, help="that machine's `pip freeze`: what is there is not carried")
    arguments = parser.parse_args()
    python = shutil.which(arguments.python) or sys.exit("error: there is no such Python here")
    installed = arguments.installed.read_text().split() if arguments.installed else []
    folder = PYTHON.parent
    shutil.rmtree(folder, ignore_errors=True)
    for name, pins in {"new": newer(), "old": _pins("autoawq", OLDER)}.items():
        (folder / name).mkdir(parents=True)
        asked = folder / f"{name}.txt"
        asked.write_text("\n".join(pin for pin in pins.values() if pin.split()[0] not in installed) + "\n")
        build(python, asked, folder / name)
    version = "import sys; print('{}.{}'.format(*sys.version_info))"
    PYTHON.write_text(subprocess.run([python, "-c", version], check=True, capture_output=True, text=True).stdout)
    sizes = {path: path.stat().st_size for path in folder.glob("*/*.whl")}
    for path, size in sorted(sizes.items(), key=lambda each: -each[1]):
        print(f"{size / 2**20:6.2f} MiB  {path.relative_to(folder)}")
    print(f"{sum(sizes.values()) / 2**20:6.2f} MiB  of {LIMIT >> 20} in {len(sizes)} wheels")
    if sum(sizes.values()) > LIMIT:
        sys.exit("error: too large: leave something out")


def newer() -> dict[str, str]:
    """The pins of what all environments share, with hashes, by name."""
    found = _pins("orchestrator", OURS)
    for environment in ENVIRONMENTS:
        found = _pins(environment) | found
    return {name: pin for name, pin in found.items() if name not in EXPECTED | UNUSED}


def build(python: str, pins: Path, folder: Path) -> None:
    """Download or build the wheels of a requirements file."""
    command = [python, "-m", "pip", "wheel", "-q", "--no-deps", "--require-hashes", "-r", str(pins), "-w", str(folder)]
    command += ["--no-binary", "auto-gptq"]  # its wheel for Python 3.11 has CUDA kernels, 22 MiB
    subprocess.run(command, env={**os.environ, "BUILD_CUDA_EXT": "0"}, check=True)
    for name, inside in CUT.items():
        for wheel in folder.glob(f"{name}-*.whl"):
            cut(wheel, inside)


def cut(wheel: Path, inside: tuple[str, ...]) -> None:
    """Leave folders out of a wheel."""
    whole = wheel.rename(wheel.with_suffix(".whole"))
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            if not entry.filename.startswith(inside):
                new.writestr(entry, old.read(entry), zipfile.ZIP_DEFLATED)
    whole.unlink()


def _pins(environment: str, names: tuple[str, ...] | None = None) -> dict[str, str]:
    lines = (REQUIREMENTS / f"{environment}.txt").read_text().replace("\\\n", " ").splitlines()
    return {name: line for name, line in _named(lines) if names is None or name in names}


def _named(lines: list[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        if found := re.match(r"([a-z0-9._-]+)==", line):
            yield found[1], line


if __name__ == "__main__":
    main()
