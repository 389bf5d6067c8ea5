"""Writes what the documentation takes from the code: ``python docs/generator``; with ``--check`` it only compares.

Every page is a function of the code, so that the reference can't say anything else. A key's description is the string
below its field, and its type, limits and default are pydantic's own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import commands
import families
import files
import folders
import serving
import settings

import stages

DOCS = Path(__file__).resolve().parent.parent
PAGES = {
    **files.PAGES,
    **commands.PAGES,
    **settings.PAGES,
    **stages.PAGES,
    **serving.PAGES,
    **folders.PAGES,
    **families.PAGES,
}


def main(arguments: list[str]) -> int:
    """Write every page that is not current, or name it and return 1."""
    made = {DOCS / name: page() for name, page in PAGES.items()}
    stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if "--check" in arguments:
            sys.stderr.write(f"{path} is not what the code says: run `make docs-reference`\n")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(made[path], encoding="utf-8")
    return int("--check" in arguments and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
