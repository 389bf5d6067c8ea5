"""What sources in object storage have in common: a bucket with a prefix, and a list that is read at one moment."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from pipeline.errors import ChangedSourceError, SourceError
from pipeline.sources.origin import Found, SourceFile

_PLACE = re.compile(r"(?P<bucket>[A-Za-z0-9._-]{3,222})(?:/(?P<prefix>[^\x00-\x1f\x7f]*?))?/?")
# At the top level of a prefix; a model has some hundred files.
MOST_OBJECTS = 10_000

Entry = TypeVar("Entry")


def split(uri: str, revision: str | None, bucket: str = "BUCKET") -> tuple[str, str]:
    """Return bucket and prefix of ``SCHEME://BUCKET/PREFIX``; ``bucket`` is the service's own word for one.

    Raises:
        SourceError: it is not such a URI, or a revision is given.
    """
    scheme, _, rest = uri.partition("://")
    match = _PLACE.fullmatch(rest)
    if match is None or ".." in uri.split("/"):
        raise SourceError(f"can't pull from `{uri}`: expected {scheme}://{bucket}/PREFIX")
    if revision is not None:
        raise SourceError(f"`revision` does not apply to {uri}: its objects are locked by their versions; remove it")
    return match["bucket"], match["prefix"] or ""


def find(uri: str, listed: Callable[[], Mapping[str, Entry]], describe: Callable[[str, Entry], SourceFile]) -> Found:
    """List the objects by name, describe each, and make sure that the list is still the same.

    Raises:
        SourceError: there are none, too many, or the list changes meanwhile.
    """
    objects = listed()
    if len(objects) > MOST_OBJECTS:
        raise SourceError(f"{uri} holds more than {MOST_OBJECTS} objects: it is not a model")
    files = tuple(describe(name, entry) for name, entry in objects.items())
    if listed() != objects:
        raise changed(uri, "its list of objects changed while it was read")
    if not files:
        raise SourceError(f"{uri} holds no objects: check the bucket and the prefix")
    return Found(None, files)


def changed(uri: str, what: str) -> SourceError:
    """Return the error of objects that are written while they are listed."""
    return SourceError(f"{uri}: {what}: run again when nobody writes to it")


def overwritten(what: str) -> ChangedSourceError:
    """Return the error of an object that is no longer the one that was listed or locked."""
    return ChangedSourceError(
        f"{what} was overwritten after it was listed or locked: restore it, or delete the model's lock file and run "
        "again"
    )
