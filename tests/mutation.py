"""Break checks one at a time, and see whether a test notices: ``python tests/mutation.py``.

Of all ``raise`` statements in ``registry/``, ``containers/gateway/`` and some modules of ``pipeline/sources/`` a number
is chosen with a fixed seed. All is done in scratch copies of the checkout, two at a time:

1. The tests run once, whole, with a note at every chosen statement: which tests reach it. They must pass.
2. Each statement becomes a ``pass`` in its turn, and the tests that reach it run until one fails. To all others the
   code is as before.

A check that no test reaches, or none misses, is a survivor. Exit status 1 where there is one.

The choice hardly depends on the rest of the code: a check that is added or removed elsewhere replaces at most one of
those that are chosen. A bare ``raise`` and one in a branch that says that it can't be reached are no checks.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

CHECKOUT = Path(__file__).resolve().parent.parent
SEED, COUNT = 14, 40
# Where checks are looked for, and the tests that are to notice.
PLACES = (
    "registry/*.py",
    "containers/gateway/*.py",
    "pipeline/sources/source.py",
    "pipeline/sources/contents.py",
    "pipeline/sources/folder.py",
)
TESTS = (
    "tests/unit/registry",
    "tests/unit/containers/gateway",
    "tests/unit/pipeline/test_origin.py",
    "tests/unit/pipeline/test_source.py",
    "tests/stages/test_moves.py",  # it needs no engine, and what moves aliases needs a real MLflow
)
_LONGEST_SECONDS, _ALL_SECONDS = 120, 1800
_WORKERS = 2
_PROBE = "mutation_probe"
_PROBE_SOURCE = """
import os

def reached(number):
    with open({log!r}, "a") as file:
        file.write(f"{{number}} {{os.environ.get('PYTEST_CURRENT_TEST', '')}}\\n")
"""


@dataclass(frozen=True)
class Check:
    """One ``raise`` statement: its file, relative to the checkout, its first and last line from 1, and its name.

    The name is its file, its text, and which of several with this text it is: it outlives edits elsewhere in the file.
    """

    path: str
    first: int
    last: int
    name: str

    def __str__(self) -> str:
        return f"{self.path}:{self.first}"

    def broken(self, source: str) -> str:
        """Return the file's text with a ``pass`` in the statement's place; the lines keep their numbers."""
        lines = source.splitlines(keepends=True)
        rest = ["\n"] * (self.last - self.first)
        return "".join([*lines[: self.first - 1], f"{self._indent(lines)}pass\n", *rest, *lines[self.last :]])

    def probed(self, source: str, number: int) -> str:
        """Return the file's text with a note before the statement, on its line."""
        lines = source.splitlines(keepends=True)
        indent = self._indent(lines)
        lines[self.first - 1] = f"{indent}__import__({_PROBE!r}).reached({number}); {lines[self.first - 1].lstrip()}"
        return "".join(lines)

    def _indent(self, lines: Sequence[str]) -> str:
        start = lines[self.first - 1]
        return start[: len(start) - len(start.lstrip())]


def checks(checkout: Path = CHECKOUT) -> list[Check]:
    """Return every check, in the order of files and lines."""
    found = []
    for pattern in PLACES:
        for path in sorted(checkout.glob(pattern)):
            file, seen = path.relative_to(checkout).as_posix(), Counter[str]()
            for node in _raises(ast.parse(path.read_text())):
                text = ast.unparse(node)
                seen[text] += 1
                found.append(Check(file, node.lineno, node.end_lineno or node.lineno, f"{file} {text} {seen[text]}"))
    return found


def _raises(tree: ast.AST) -> Iterator[ast.Raise]:
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None)
    return iter(sorted((n for n in found if "unreachable" not in ast.unparse(n)), key=lambda node: node.lineno))


def chosen(known: Sequence[Check], seed: int, count: int) -> list[Check]:
    """Return ``count`` of the checks, in an order that depends on the seed and on their names alone."""
    return sorted(known, key=lambda check: hashlib.sha256(f"{seed} {check.name}".encode()).digest())[:count]


def reaching(picked: Sequence[Check], copy: Path) -> dict[Check, list[str]]:
    """Run the tests once; return for each check those that reach it.

    Raises:
        SystemExit: The tests fail as it is.
    """
    log, whole = copy.parent / "reached", {check.path: (copy / check.path).read_text() for check in picked}
    log.touch()
    (copy / f"{_PROBE}.py").write_text(_PROBE_SOURCE.format(log=str(log)))
    for number, check in enumerate(picked):
        (copy / check.path).write_text(check.probed((copy / check.path).read_text(), number))
    ended = _pytest(copy, TESTS, _ALL_SECONDS)
    for path, text in whole.items():
        (copy / path).write_text(text)
    if ended.returncode != 0:
        sys.exit(f"the tests fail with no check broken:\n{ended.stdout}{ended.stderr}")
    found: dict[Check, dict[str, None]] = {check: {} for check in picked}
    for line in log.read_text().splitlines():
        reached, _, test = line.partition(" ")
        # Without its parameters; what is reached while tests are collected may matter to all.
        names = [test.partition("[")[0].partition(" ")[0]] if test else TESTS
        found[picked[int(reached)]].update(dict.fromkeys(names))
    return {check: list(tests) for check, tests in found.items()}


def noticing(check: Check, copy: Path, tests: Sequence[str]) -> str | None:
    """Break the check in the copy, run the tests, and mend it; return the first that fails, None where none does."""
    place = copy / check.path
    whole = place.read_text()
    place.write_text(check.broken(whole))
    try:
        ended = _pytest(copy, tests, _LONGEST_SECONDS)
    except subprocess.TimeoutExpired:  # a check that kept something from running for ever
        return f"no end within {_LONGEST_SECONDS} s"
    finally:
        place.write_text(whole)
    if ended.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", ended.stdout, re.MULTILINE)
    return failed[1] if failed else f"pytest ended with status {ended.returncode}"


def _pytest(copy: Path, tests: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        cwd=copy, check=False, capture_output=True, text=True, errors="replace", timeout=seconds,
        env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Break the chosen checks; print each with what became of it, and the survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--list", action="store_true", help="print the chosen checks, and break none")
    parser.add_argument("--only", type=int, metavar="N", action="append", help="break this of the chosen alone")
    options = parser.parse_args(arguments)
    known = checks()
    numbered = dict(enumerate(chosen(known, options.seed, options.count), 1))
    if options.list:
        sys.stdout.write("".join(f"{number:3}  {check}\n" for number, check in numbered.items()))
        return 0
    if options.only:
        numbered = {number: numbered[number] for number in options.only if number in numbered}
    survivors: list[str] = []
    with tempfile.TemporaryDirectory(prefix="slipway-mutation-") as folder, ThreadPoolExecutor(_WORKERS) as workers:
        free = SimpleQueue[Path]()
        for name in range(_WORKERS):
            copy = Path(folder) / str(name) / "checkout"
            shutil.copytree(CHECKOUT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__"))
            free.put(copy)
        reached = reaching(list(numbered.values()), copy)

        def broken(check: Check) -> str | None:
            copy = free.get()
            try:
                return noticing(check, copy, reached[check]) if reached[check] else None
            finally:
                free.put(copy)

        for (number, check), by in zip(numbered.items(), workers.map(broken, numbered.values()), strict=True):
            if by is None:
                survivors.append(f"{check}: {len(reached[check])} tests reach it, and none fails")
            sys.stdout.write(f"{number:3}  {check}  {f'noticed by {by}' if by else 'SURVIVED'}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(survivors)} of {len(numbered)} survived (of {len(known)} checks, seed {options.seed})\n")
    sys.stdout.write("".join(f"- {survivor}\n" for survivor in survivors))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
