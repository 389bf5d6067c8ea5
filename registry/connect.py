"""Opening the store or server that a tracking URI names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from registry.backend import RegistryBackend
from registry.embedded import Embedded
from registry.tracking import connected


@contextmanager
def open_backend(tracking_uri: str) -> Iterator[RegistryBackend]:
    """Open the store or server at ``tracking_uri``.

    Raises:
        TrackingError: It can't be reached, or what was asked of it failed.
    """
    if urlsplit(tracking_uri).scheme in ("http", "https"):
        from registry.server import MlflowServer  # noqa: PLC0415 - its HTTP client, for those who have a server

        with MlflowServer(tracking_uri) as server:
            yield server
    else:
        with connected(tracking_uri) as client:
            yield Embedded(client)
