"""Runs the parts one after the other, each in a process with a time limit, and writes the document after each.

`benchmarks/gpu.sh` starts it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from benchmarks.gpu.document import GpuRun, Part
from benchmarks.gpu.parts import PARTS, Context, PartFailed, PartSkipped
from benchmarks.gpu.unpack import FOLDER, PYTHON
from pipeline.errors import SlipwayError
from pipeline.settings import Settings
from registry.atomic_write import write_atomically

# A machine is lent for 10 minutes: unpacking before, and the copy of the document after, need the rest.
LIMIT_SECONDS = 450
DRY_RUN_FACTOR = 10
TAIL_BYTES = 2000


def main() -> None:
    """Run all parts or those that are named; as ``part`` do the one that is named in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "part"])
    parser.add_argument("names", nargs="*", metavar="PART", help=f"all if none is named: {', '.join(PARTS)}")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU: what needs a GPU is skipped")
    parser.add_argument("--out", type=Path, default=FOLDER / "gpu.json", help="the document (default: .gpu/gpu.json)")
    arguments = parser.parse_intermixed_args()
    if unknown := set(arguments.names) - PARTS.keys():
        parser.error(f"there is no part `{min(unknown)}`")
    if arguments.command == "part":
        part(arguments.names[0], arguments.out)
    else:
        sys.exit(0 if run(arguments.out, dry_run=arguments.dry_run, names=arguments.names or list(PARTS)) else 1)


def run(out: Path, *, dry_run: bool, names: Sequence[str]) -> bool:
    """Run parts and write the document; returns whether none failed."""
    started, factor = time.monotonic(), DRY_RUN_FACTOR if dry_run else 1
    document = GpuRun(
        started=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        dry_run=dry_run,
        seconds=0,
        carried_bytes=sum(path.stat().st_size for path in PYTHON.parent.glob("*/*.whl")),
    )
    write_atomically(out, document.model_dump_json(indent=1))
    for name in names:
        left = factor * LIMIT_SECONDS - (time.monotonic() - started)
        done = _in_process(name, out, min(factor * PARTS[name].limit, left)) if left > 0 else _no_time(name)
        document = document.model_copy(
            update={"parts": (*document.parts, done), "seconds": round(time.monotonic() - started, 1)}
        )
        write_atomically(out, document.model_dump_json(indent=1))
        print(f"{done.status:8}{done.seconds:6.1f} s  {name}{f': {done.reason}' if done.reason else ''}", flush=True)
    return all(each.status != "failed" for each in document.parts)


def part(name: str, out: Path) -> None:
    """Do one part of the run that ``out`` describes, and print its `Part`."""
    document = GpuRun.model_validate_json(out.read_text())
    context = Context(Settings.read({**os.environ, "SLIPWAY_HOME": str(FOLDER / "home")}), document, document.dry_run)
    started = time.monotonic()
    try:
        found = PARTS[name].work(context)
        done = Part(part=name, status="ok", seconds=0, found=found)
    except PartSkipped as error:
        done = Part(part=name, status="skipped", seconds=0, reason=str(error))
    except Exception as error:  # noqa: BLE001 - a library may raise anything, and the other parts still run
        found = error.found if isinstance(error, PartFailed) else None
        done = Part(part=name, status="failed", seconds=0, reason=_reason(error), found=found)
    print(done.model_copy(update={"seconds": round(time.monotonic() - started, 1)}).model_dump_json())


def _in_process(name: str, out: Path, limit: float) -> Part:
    """Do a part in a process group of its own, which is killed at the limit."""
    started = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu", "part", name, "--out", str(out)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
        reason = f"it was stopped after {limit:.0f} s; its last lines: {_tail(errors)}"
        return Part(part=name, status="failed", seconds=round(time.monotonic() - started, 1), reason=reason)
    try:
        return Part.model_validate_json(output.splitlines()[-1])
    except (IndexError, ValidationError):
        reason = f"its process ended with status {process.returncode}; its last lines: {_tail(errors)}"
        return Part(part=name, status="failed", seconds=round(time.monotonic() - started, 1), reason=reason)


def _no_time(name: str) -> Part:
    return Part(part=name, status="skipped", seconds=0, reason="no time was left")


def _reason(error: Exception) -> str:
    text = str(error) if isinstance(error, PartFailed | SlipwayError) else f"{type(error).__name__}: {error}"
    return text[-TAIL_BYTES:]


def _tail(errors: bytes) -> str:
    return errors[-TAIL_BYTES:].decode(errors="replace").strip()


if __name__ == "__main__":
    main()
