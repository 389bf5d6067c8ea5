"""Reads the registry: release lines, their versions, and their aliases.

An SQLite store is read directly, in milliseconds; MLflow's client takes over five seconds for the same answer. If the
tables are not as expected, and for every other store, MLflow is asked. A test compares both answers.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from registry.backend import EXPERIMENT, LOCK_PREFIX, MANIFEST_TAG, MODEL_TAG, Line, Version
from registry.connect import open_backend
from registry.errors import TrackingError
from registry.tracking import database_path

__all__ = ["MANIFEST_TAG", "MODEL_TAG", "Version", "champion_digest", "current", "line", "lines", "names"]

_WORKSPACE = "default"
_DELETED = "Deleted_Internal"


def current(tracking_uri: str, name: str) -> list[Version]:
    """Return the versions of the release line ``name``, newest first; empty if it does not exist.

    Raises:
        TrackingError: The store can't be reached or read.
    """
    path = database_path(tracking_uri)
    if path is None:
        return _asked(tracking_uri, name)
    if not path.exists():
        return []
    try:
        return _read(path, name)
    except sqlite3.OperationalError:
        return _asked(tracking_uri, name)
    except sqlite3.DatabaseError as error:
        raise _damaged(path, error) from error


def names(tracking_uri: str) -> list[str]:
    """Return the names of all release lines.

    Raises:
        TrackingError: The store can't be reached or read.
    """
    path = database_path(tracking_uri)
    if path is not None and not path.exists():
        return []
    try:
        if path is not None:
            with _database(path) as database:
                query = "SELECT name FROM registered_models WHERE workspace = ? ORDER BY name"
                found = [row[0] for row in database.execute(query, (_WORKSPACE,))]
                return [name for name in found if not name.startswith(LOCK_PREFIX)]
    except sqlite3.OperationalError:
        pass  # the tables are of another MLflow version: ask MLflow
    except sqlite3.DatabaseError as error:
        raise _damaged(path, error) from error
    with open_backend(tracking_uri) as backend:
        return [name for name in backend.names() if not name.startswith(LOCK_PREFIX)]


def lines(tracking_uri: str, model: str | None = None) -> list[Version]:
    """Return the versions of every release line, newest first in each; with ``model``, of that model's lines alone."""
    found = [version for name in names(tracking_uri) for version in current(tracking_uri, name)]
    return [version for version in found if model is None or model in (version.name, version.tags.get(MODEL_TAG))]


def line(tracking_uri: str, name: str) -> Line | None:
    """Return what is kept of the release line itself, aliases and tags; None if the line does not exist.

    Raises:
        TrackingError: The store can't be reached or read.
    """
    path = database_path(tracking_uri)
    if path is not None and not path.exists():
        return None
    try:
        if path is not None:
            return _read_line(path, name)
    except sqlite3.OperationalError:
        pass  # the tables are of another MLflow version: ask MLflow
    except sqlite3.DatabaseError as error:
        raise _damaged(path, error) from error
    with open_backend(tracking_uri) as backend:
        return backend.line(name)


def artifact_root(tracking_uri: str) -> str | None:
    """Return where uploaded releases are stored; None before the first upload.

    Raises:
        TrackingError: The store can't be reached or read.
    """
    path = database_path(tracking_uri)
    if path is not None and not path.exists():
        return None
    try:
        if path is not None:
            with _database(path) as database:
                query = "SELECT artifact_location FROM experiments WHERE name = ? AND workspace = ?"
                found = database.execute(query, (EXPERIMENT, _WORKSPACE)).fetchone()
                return None if found is None else str(found[0])
    except sqlite3.OperationalError:
        pass  # the tables are of another MLflow version: ask MLflow
    except sqlite3.DatabaseError as error:
        raise _damaged(path, error) from error
    with open_backend(tracking_uri) as backend:
        return backend.artifact_root()


def version(tracking_uri: str, name: str, number: str) -> Version | None:
    """Return one version of a line, or None. ``TrackingError`` as `current`."""
    if urlsplit(tracking_uri).scheme in ("http", "https"):
        with open_backend(tracking_uri) as backend:
            return backend.version(name, number)
    return next((found for found in current(tracking_uri, name) if found.version == number), None)


def champion_digest(tracking_uri: str, name: str) -> str | None:
    """Return the manifest digest of the champion; None if nothing was promoted."""
    found = [version for version in current(tracking_uri, name) if "champion" in version.aliases]
    return found[0].manifest_digest if found else None


def _asked(tracking_uri: str, name: str) -> list[Version]:
    with open_backend(tracking_uri) as backend:
        return backend.versions(name)


def _read(path: Path, name: str) -> list[Version]:
    """Read the four tables of MLflow's registry as of 3.10 and later (with workspaces)."""
    tags: dict[int, dict[str, str]] = defaultdict(dict)
    aliases: dict[int, list[str]] = defaultdict(list)
    key = (name, _WORKSPACE)
    with _database(path) as database:
        database.execute("BEGIN")  # one snapshot for the three queries
        for number, tag, value in database.execute(
            "SELECT version, key, value FROM model_version_tags WHERE name = ? AND workspace = ?", key
        ):
            tags[number][tag] = value
        for number, alias in database.execute(
            "SELECT version, alias FROM registered_model_aliases WHERE name = ? AND workspace = ?", key
        ):
            aliases[number].append(alias)
        rows = database.execute(
            "SELECT version, COALESCE(storage_location, source), creation_time FROM model_versions"
            " WHERE name = ? AND workspace = ? AND current_stage != ? ORDER BY version DESC",
            (*key, _DELETED),
        ).fetchall()
    return [
        Version(name, str(number), tuple(sorted(aliases[number])), tags[number], location, _time(created))
        for number, location, created in rows
    ]


def _read_line(path: Path, name: str) -> Line | None:
    key = (name, _WORKSPACE)
    with _database(path) as database:
        database.execute("BEGIN")
        if not database.execute("SELECT 1 FROM registered_models WHERE name = ? AND workspace = ?", key).fetchone():
            return None
        aliases = database.execute(
            "SELECT alias, version FROM registered_model_aliases WHERE name = ? AND workspace = ?", key
        ).fetchall()
        tags = database.execute(
            "SELECT key, value FROM registered_model_tags WHERE name = ? AND workspace = ?", key
        ).fetchall()
    return Line(name, {alias: str(number) for alias, number in aliases}, dict(tags))


@contextmanager
def _database(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the database for reading; wait half a minute for a writer."""
    uri = f"{path.absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True, timeout=30, isolation_level=None)) as database:
        yield database


def _damaged(path: Path | None, error: sqlite3.DatabaseError) -> TrackingError:
    return TrackingError(f"`{path}` can't be read as MLflow's database: {error}")


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
