"""Packages of npm that tests run, pinned by hash in their locks; Node.js is a wheel of the development environment."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path


def node(program: str) -> str:
    """The path of ``node`` or ``npm``."""
    return str(Path(sys.executable).with_name(program))


def install(package: Path, folder: Path) -> None:
    """Copy a package's files into a folder, and install there what its lock names."""
    shutil.copytree(package, folder, dirs_exist_ok=True)
    command = [node("npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
