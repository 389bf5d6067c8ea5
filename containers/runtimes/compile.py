"""Runs inside the image under construction: compiles every package, so that the same sources give the same bytecode.

What ``marshal`` writes depends on what else the process holds. So each package is compiled by a process of its own that
compiles nothing else, in the order of names, with a fixed hash seed. The files name their source by no time
(``unchecked-hash``). Some sources are for another Python; they are never imported, and stay as they are.
"""
# ruff: noqa: INP001 - a script that is copied into an image

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_OPTIONS = ("-qq", "-f", "--invalidation-mode", "unchecked-hash", "-x", "/tests?/")


def main(folder: Path) -> None:
    """Compile what is in ``folder``, large packages first, as many at a time as there are processors."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix not in {".dist-info", ".libs", ".pth"})
    names.sort(key=lambda name: -sum(path.stat().st_size for path in (folder / name).rglob("*.py")))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda name: _compile(folder, name), names))


def _compile(folder: Path, name: str) -> None:
    command = [sys.executable, "-m", "compileall", *_OPTIONS, name]
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONHASHSEED": "0"}, check=False)
    # 1 is a source for another Python. One that was killed, for want of memory, would leave other bytes than before.
    if done.returncode not in {0, 1}:
        raise SystemExit(f"compiling {name} ended with status {done.returncode}: is there memory enough?")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
