"""The folders of the code, each in the words of its ``__init__.py``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from fields import cell, page, row

from pipeline.resources import PACKAGES

_NAMES = ("pipeline", "evals", "containers", "registry")


def folders() -> str:
    """Every folder, with what it has."""
    rows = ["| folder | has |", "|---|---|"]
    for folder in _folders():
        told = (ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or "").split("\n\n")
        rows.append(row(f"`{folder.relative_to(PACKAGES)}/`", cell(told[0])))
    return page("Folders of the code", "", ["\n".join(rows)])


def _folders() -> Iterator[Path]:
    for name in _NAMES:
        yield from sorted(path.parent for path in (PACKAGES / name).rglob("__init__.py"))


PAGES = {"reference/folders.md": folders}
