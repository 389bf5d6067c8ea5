"""Which files of a version are in object storage instead of on the local disk: ``cold.json`` beside its folder.

The rules for writing it, and for moving the files, are those of `registry.tiers`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry import untrusted
from registry.atomic_write import write_atomically
from registry.errors import TrackingError, UntrustedFileError, first_problem
from registry.manifest import CoveredPath, FileRecord

MARKER = "cold.json"
SCHEMA = "slipway.cold/v1"
LARGEST_MARKER = 16 << 20


class _Marker(BaseModel):
    """What `cold.json` may say: its names become paths."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal["slipway.cold/v1"] = Field(alias="schema")
    store: str
    files: Mapping[CoveredPath, FileRecord]


def cold_files(folder: Path) -> tuple[str, Mapping[str, FileRecord]]:
    """The store and the files that a version's folder has there; nothing where none are cold.

    Raises:
        TrackingError: `cold.json` can't be read.
    """
    path = folder.parent / MARKER
    try:
        document = json.loads(untrusted.read(folder.parent, MARKER, LARGEST_MARKER))
    except FileNotFoundError:
        return "", {}
    except (OSError, ValueError, RecursionError, UntrustedFileError) as error:
        raise TrackingError(f"`{path}` can't be read: {error}") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise TrackingError(f"`{path}` has schema {schema!r}; this program reads `{SCHEMA}`")
    try:
        marker = _Marker.model_validate(document)
    except ValidationError as error:
        raise TrackingError(f"`{path}` is not valid: {first_problem(error)}") from error
    return marker.store, marker.files


def write_marker(folder: Path, store: str, files: Mapping[str, FileRecord]) -> None:
    """Write `cold.json`; it is on the disk when this returns, so that local files may be removed."""
    document = {
        "schema": SCHEMA,
        "store": store,
        "files": {name: record.model_dump() for name, record in files.items()},
    }
    write_atomically(folder.parent / MARKER, json.dumps(document, indent=1))
