"""Break checks one at a time, and see whether a unit test notices: ``python tests/mutation.py``.

Of all ``raise`` statements in ``registry/``, ``containers/gateway/`` and ``pipeline/source*.py`` a number is chosen
with a fixed seed. In a scratch copy of the checkout each becomes a ``pass`` in its turn, and the unit tests of its
package run until one fails. A mutant that all tests pass is a survivor: a check that nobody would miss. Exit status 1
where there is one.

A bare ``raise`` and one in a branch that says that it can't be reached are no checks, and not chosen.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
SEED, COUNT = 14, 40
# Where checks are looked for, and the tests that are to notice.
PLACES = {
    "registry/*.py": ("tests/unit/registry",),
    "containers/gateway/*.py": ("tests/unit/containers/gateway",),
    "pipeline/source*.py": ("tests/unit/pipeline/test_source.py",),
}
_LONGEST_SECONDS = 300


@dataclass(frozen=True)
class Check:
    """One ``raise`` statement: its file, relative to the checkout, and its first and last line, from 1."""

    path: str
    first: int
    last: int
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path}:{self.first}"

    def broken(self, source: str) -> str:
        """Return the file's text with a ``pass`` in the statement's place; the lines keep their numbers."""
        lines = source.splitlines(keepends=True)
        start = lines[self.first - 1]
        indent = start[: len(start) - len(start.lstrip())]
        rest = ["\n"] * (self.last - self.first)
        return "".join([*lines[: self.first - 1], f"{indent}pass\n", *rest, *lines[self.last :]])


def checks(checkout: Path = CHECKOUT) -> list[Check]:
    """Return every check, in a fixed order."""
    found = []
    for pattern, tests in PLACES.items():
        for path in sorted(checkout.glob(pattern)):
            tree = ast.parse(path.read_text())
            name = path.relative_to(checkout).as_posix()
            own = f"{tests[0]}/test_{path.stem}.py"  # first, so that what is noticed is noticed soon
            first = (own,) if (checkout / own).is_file() else ()
            found += [
                Check(name, node.lineno, node.end_lineno or node.lineno, (*first, *tests)) for node in _raises(tree)
            ]
    return found


def _raises(tree: ast.AST) -> Iterator[ast.Raise]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None and "unreachable" not in ast.unparse(node.exc):
            yield node


def survives(check: Check, copy: Path) -> bool:
    """Break the check in the copy, run its tests, and mend it again; True where no test fails."""
    place = copy / check.path
    whole = place.read_text()
    place.write_text(check.broken(whole))
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *check.tests],
            cwd=copy, check=False, capture_output=True, timeout=_LONGEST_SECONDS,
            env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:  # a check that kept something from running for ever
        return False
    finally:
        place.write_text(whole)
    return ended.returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Break the chosen checks; print each with what became of it, and the survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--only", metavar="FILE", help="choose among the checks of this file alone")
    options = parser.parse_args(arguments)
    known = [check for check in checks() if options.only in (None, check.path)]
    chosen = random.Random(options.seed).sample(known, min(options.count, len(known)))
    survivors = []
    with tempfile.TemporaryDirectory(prefix="slipway-mutation-") as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(CHECKOUT, copy, ignore=shutil.ignore_patterns(".git", ".venv", ".slipway", "__pycache__"))
        for number, check in enumerate(chosen, 1):
            survived = survives(check, copy)
            survivors += [check] if survived else []
            sys.stdout.write(f"{number:3} of {len(chosen)}  {'SURVIVED' if survived else 'noticed '}  {check}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(survivors)} of {len(chosen)} survived (of {len(known)} checks, seed {options.seed})\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
