"""The script that compiles a runtime's packages: bytecode for all of them, or no runtime."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from containers.image.profile import RUNTIMES


def compiled(folder: Path) -> None:
    runpy.run_path(str(RUNTIMES / "compile.py"))["main"](folder)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    for name, source in {"good": "x = 1\n", "foreign": "print 'another Python'\n"}.items():
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "module.py").write_text(source)
    return tmp_path / "site"


def test_a_source_for_another_python_stays_as_it_is(packages: Path) -> None:
    compiled(packages)
    assert len(list(packages.glob("good/__pycache__/module.*.pyc"))) == 1
    assert not list(packages.glob("foreign/**/*.pyc"))


def test_a_compiler_that_is_killed_is_an_error(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    with pytest.raises(SystemExit, match="ended with status -9"):
        compiled(packages)
