"""Reading what is stored: a reading that breaks off is gone on with, and says nothing about what is there."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from registry.download import Reader
from registry.stream import stream
from registry.version_files import fetch, sha256

DATA = bytes(range(256)) * 20


class Unreliable(BaseHTTPRequestHandler):
    """Busy at first, then breaking off halfway, then whole; with byte ranges or without."""

    asked = 0
    ranges = True

    def do_GET(self) -> None:
        """Answer the next request."""
        kind = type(self)
        kind.asked += 1
        if kind.asked == 1:
            self.send_error(503)
            return
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if kind.ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
        self.send_header("Content-Length", str(len(DATA) - start))
        self.end_headers()
        self.wfile.write(DATA[start : len(DATA) // 2] if kind.asked == 2 else DATA[start:])

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Stored:
    """One file, at an address."""

    def __init__(self, address: str) -> None:
        self.address = address

    def names(self) -> list[str]:
        return ["file"]

    def open(self, name: str, start: int = 0) -> AbstractContextManager[tuple[Reader, int]]:
        return stream(f"{self.address}/{name}", {}, start)


@contextmanager
def served(*, ranges: bool) -> Iterator[Stored]:
    handler = type("Handler", (Unreliable,), {"asked": 0, "ranges": ranges})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Stored(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_reading_that_breaks_off_is_gone_on_with(tmp_path: Path, *, ranges: bool) -> None:
    with served(ranges=ranges) as stored:
        assert sha256(stored, "file") == hashlib.sha256(DATA).hexdigest()
    with served(ranges=ranges) as stored:
        assert fetch(stored, "file", tmp_path, len(DATA)).read_bytes() == DATA
