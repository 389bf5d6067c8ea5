"""Unpacks the carried wheels: `.gpu/wheels/SET/*.whl` into `.gpu/site/SET`. Needs Python alone."""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".gpu"
PYTHON = FOLDER / "wheels" / "python"
"""Names the Python that the wheels are for, `3.12`."""


def main() -> None:
    """Unpack all sets, or end with one line that says what to do."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    chosen = PYTHON.read_text().strip() if PYTHON.exists() else None
    if chosen != here:
        there = "there are no wheels" if chosen is None else f"the wheels are for Python {chosen}"
        sys.exit(
            f"error: {there}, and this is Python {here}: run `python -m benchmarks.gpu.wheels --python python{here}`"
        )
    shutil.rmtree(FOLDER / "site", ignore_errors=True)
    for wheel in sorted(PYTHON.parent.glob("*/*.whl")):
        # A wheel is an archive of what belongs into site-packages; nothing here needs its scripts.
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(FOLDER / "site" / wheel.parent.name)


if __name__ == "__main__":
    main()
