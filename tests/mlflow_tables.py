"""A registry in an SQLite file, written without MLflow: those of its tables that `registry.catalog` reads."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from registry.backend import EXPERIMENT, MANIFEST_TAG, Line

_TABLES = """
CREATE TABLE experiments (name, workspace, artifact_location);
CREATE TABLE registered_models (name, workspace);
CREATE TABLE registered_model_aliases (name, workspace, alias, version);
CREATE TABLE registered_model_tags (name, workspace, key, value);
CREATE TABLE model_versions (name, workspace, version, storage_location, source, creation_time, current_stage);
CREATE TABLE model_version_tags (name, workspace, version, key, value);
"""


def write_tables(path: Path, line: Line, digests: Mapping[str, str], location: str = "/nowhere") -> str:
    """Write the line, and a version for each number with its manifest's digest; return the tracking URI.

    All versions lie in the folder ``location``, which is within the registry's artifact root.
    """
    path.unlink(missing_ok=True)
    own = (line.name, "default")
    with closing(sqlite3.connect(path)) as database:
        database.executescript(_TABLES)
        database.execute(
            "INSERT INTO experiments VALUES (?, ?, ?)", (EXPERIMENT, "default", str(Path(location).parent))
        )
        database.execute("INSERT INTO registered_models VALUES (?, ?)", own)
        database.executemany(
            "INSERT INTO registered_model_aliases VALUES (?, ?, ?, ?)", [(*own, *row) for row in line.aliases.items()]
        )
        database.executemany(
            "INSERT INTO registered_model_tags VALUES (?, ?, ?, ?)", [(*own, *row) for row in line.tags.items()]
        )
        for number, digest in digests.items():
            database.execute(
                "INSERT INTO model_versions VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*own, int(number), None, location, 0, "None"),
            )
            database.execute(
                "INSERT INTO model_version_tags VALUES (?, ?, ?, ?, ?)", (*own, int(number), MANIFEST_TAG, digest)
            )
        database.commit()
    return f"sqlite:///{path}"
