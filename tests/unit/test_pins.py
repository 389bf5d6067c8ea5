"""Everything that is executed during set-up is pinned by hash, but for apt, torch and the pip that Python brings."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LOCKS = sorted([*ROOT.glob("requirements/*.txt"), *ROOT.glob("containers/runtimes/*.txt")])
_PINNED = re.compile(
    r"[A-Za-z0-9][\w.-]*(\[[\w,-]+\])?==[\w.!+-]+"  # a name and one version
    r"(\s*;[^\\\n]+?)?"  # where it is wanted
    r"(\s+--hash=sha256:[0-9a-f]{64})+"
)
# What installs or builds, and what then holds it to its hashes.
_INSTALLS = re.compile(r"\b(?:pip install|uv build)\b.*")
_HELD = re.compile(
    r"--require-hashes .*-r requirements/[\w-]+\.txt$"
    r"|--require(-build)?-hashes --build-constraints requirements/hatchling\.txt"
)


def requirements(path: Path) -> list[str]:
    text = path.read_text().replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_every_line_of_every_lock_is_pinned_with_hashes(lock: Path) -> None:
    lines = requirements(lock)
    assert lines
    if lock.name == "torch.txt":  # which build fits depends on the machine
        assert lines == ["torch==2.13.0"]
    else:
        assert [line for line in lines if not _PINNED.fullmatch(line)] == []


@pytest.mark.parametrize("name", ["Makefile", "registry/Dockerfile"])
def test_every_installation_of_the_set_up_is_held_to_hashes(name: str) -> None:
    found = [match[0] for match in map(_INSTALLS.search, (ROOT / name).read_text().splitlines()) if match]
    own = [line for line in found if "--no-deps build/slipway_registry-" in line]  # the wheel that was just built
    assert len(found) - len(own) >= 2
    assert [line for line in found if line not in own and not _HELD.search(line)] == []


@pytest.mark.parametrize("name", ["pyproject.toml", "registry/pyproject.toml"])
def test_what_builds_this_project_is_in_a_lock(name: str) -> None:
    wanted = tomllib.loads((ROOT / name).read_text())["build-system"]["requires"]
    assert set(wanted) <= {line.partition("==")[0] for line in requirements(ROOT / "requirements/hatchling.txt")}


def test_an_audit_asks_about_every_lock() -> None:
    said = subprocess.run(
        ["make", "-n", "-o", ".venv/.pins", "audit"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (asked,) = [line for line in said.stdout.splitlines() if "bin/pip-audit " in line]
    named = set(re.findall(r"-r (\S+)", asked))
    assert named == {str(path.relative_to(ROOT)) for path in LOCKS if path.name != "torch.txt"}
    assert "--strict" in asked
