"""A registry that means harm: every answer is bounded, and what follows an alias survives them all."""

from __future__ import annotations

import gzip
import itertools
import json
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from registry import network, server, version_files
from registry.bounded_json import Bounds
from registry.download import ByteCount, InterruptedStreamError, download
from registry.errors import ArgumentError, ManifestError, Problem, TrackingError, VerificationError
from registry.manifest import BOUNDS, FileRecord, Manifest
from registry.server import MlflowServer
from registry.stream import stream
from registry.version_files import ServerArtifacts
from registry.watch import watch

Answer = Callable[[BaseHTTPRequestHandler], None]


class Hostile(ThreadingHTTPServer):
    """Gives the answer that a test wants, to whatever it is asked."""

    daemon_threads = True
    answer: Answer

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Hostile)
        self.server.answer(self)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    found = Hostile(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=found.serve_forever, args=(0.01,))
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def says(body: bytes | str, encoding: str | None = None) -> Answer:
    """An answer with this body."""
    data = body.encode() if isinstance(body, str) else body

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        if encoding is not None:
            handler.send_header("Content-Encoding", encoding)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def trickles(handler: BaseHTTPRequestHandler) -> None:
    """An answer that goes on and on, some bytes at a time, each in time."""
    handler.send_response(200)
    handler.end_headers()
    try:
        for _ in range(500):  # an end after all, for a reader that knows none
            handler.wfile.write(b" ")
            time.sleep(0.02)
    except OSError:
        pass


def trickles_headers(handler: BaseHTTPRequestHandler) -> None:
    """Headers that never end, a byte at a time, each in time."""
    try:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while True:
            handler.wfile.write(b"x")
            time.sleep(0.02)
    except OSError:
        pass


def everything(address: str) -> None:
    """Ask all that a pull asks."""
    with MlflowServer(address) as asked:
        for question in (
            asked.names,
            lambda: asked.line("demo"),
            lambda: asked.versions("demo"),
            lambda: asked.version("demo", "1"),
            lambda: asked.list_proxied("x"),
            lambda: asked.presigned("x"),
        ):
            try:
                question()
            except TrackingError:
                continue


WRONG = [
    "",
    "null",
    "[]",
    "3",
    "<html>",
    "[" * 100_000,
    '{"a":' * 10_000 + "1" + "}" * 10_000,
    json.dumps({"registered_models": 3, "model_versions": {"a": 1}, "registered_model": None, "files": "ab"}),
    json.dumps({"registered_models": [3], "model_versions": [[]], "registered_model": [], "files": [{"path": 3}]}),
    json.dumps({"registered_model": {"aliases": [3]}, "url": 3, "model_version": 3}),
    json.dumps({"registered_model": {"aliases": [{"alias": [], "version": {}}]}, "url": "x", "headers": [3]}),
    json.dumps({"registered_model": {"tags": [{"key": {}}]}, "next_page_token": {}}),
    json.dumps({"model_version": {"name": "demo", "version": "x", "source": "a", "creation_timestamp": "1"}}),
    json.dumps({"model_version": {"name": "demo", "version": "1", "source": [], "creation_timestamp": "1"}}),
    json.dumps({"model_version": {"name": "demo", "version": "1", "source": "a", "creation_timestamp": 10**30}}),
    json.dumps({"model_version": {"name": "demo", "version": "1", "source": "a", "creation_timestamp": {}}}),
    json.dumps({"error_code": [], "message": {}}),
]


@pytest.mark.parametrize("body", WRONG, ids=lambda body: body[:40])
def test_json_of_another_form_is_an_error_of_the_registry(hostile: Hostile, body: str) -> None:
    hostile.answer = says(body)
    everything(hostile.address)


@pytest.mark.parametrize("told", [{"version": "5"}, {"name": "other"}])
def test_a_version_that_was_not_asked_for_is_not_taken(hostile: Hostile, told: dict[str, str]) -> None:
    version = {"name": "demo", "version": "3", "source": "mlflow-artifacts:/1/a", "creation_timestamp": 1, **told}
    line = {"name": "demo", "aliases": [], "tags": []}
    hostile.answer = says(json.dumps({"model_version": version, "registered_model": line, "model_versions": [version]}))
    with (
        MlflowServer(hostile.address) as asked,
        pytest.raises(TrackingError, match="where version 3 of `demo` was asked"),
    ):
        asked.version("demo", "3")
    if "name" in told:
        with (
            MlflowServer(hostile.address) as asked,
            pytest.raises(TrackingError, match="where one of `demo` was asked"),
        ):
            asked.versions("demo")


@pytest.mark.parametrize("headers", [{"X": "a\r\nHost: b"}, {"X": "\u2100"}, {"X\n": "a"}, {"": "a"}, {"X: Y": "\0"}])
def test_headers_that_cannot_be_sent_are_an_error_of_the_registry(hostile: Hostile, headers: dict[str, str]) -> None:
    hostile.answer = says(json.dumps({"url": f"{hostile.address}/x", "headers": headers}))
    with MlflowServer(hostile.address) as asked, pytest.raises(TrackingError, match="not MLflow's"):
        asked.presigned("x")


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/x", "http://[::1", "http://127.0.0.1:99999/x", "file:///etc/passwd"])
def test_an_address_of_a_file_that_a_redirect_could_not_have_is_not_asked(hostile: Hostile, url: str) -> None:
    hostile.answer = says(json.dumps({"url": url}))
    with MlflowServer(hostile.address) as asked:
        assert asked.presigned("x") is None


@pytest.mark.parametrize("name", ["..", "", "a/b", ".", "/etc"])
def test_a_listing_gives_names_and_no_paths(hostile: Hostile, name: str) -> None:
    hostile.answer = says(json.dumps({"files": [{"path": name, "is_dir": True}]}))
    with MlflowServer(hostile.address) as asked, pytest.raises(TrackingError, match="a path in place of a name"):
        asked.list_proxied("x")


def test_an_answer_that_is_no_object_is_not_mlflows(hostile: Hostile) -> None:
    hostile.answer = says("[]")
    with MlflowServer(hostile.address) as asked, pytest.raises(TrackingError, match="expected a JSON object"):
        asked.names()


def test_a_compressed_answer_is_not_unpacked(hostile: Hostile) -> None:
    hostile.answer = says(gzip.compress(b" " * (64 << 20)), "gzip")
    tracemalloc.start()
    with MlflowServer(hostile.address) as asked, pytest.raises(TrackingError, match="compressed"):
        asked.names()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_an_answer_has_a_largest_size(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_BOUNDS", Bounds(bytes=1000, values=100))
    hostile.answer = says(b" " * 1001)
    with MlflowServer(hostile.address) as asked, pytest.raises(TrackingError, match="more than 1000 bytes"):
        asked.names()


def test_an_answer_has_a_longest_time(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_ANSWER_SECONDS", 0.1)
    hostile.answer = trickles
    with MlflowServer(hostile.address) as asked, pytest.raises(TrackingError, match=r"more than 0\.1 s"):
        asked.names()


def test_headers_have_a_longest_time(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(server, "_ATTEMPTS", 1)
    hostile.answer = trickles_headers
    with MlflowServer(hostile.address) as asked, pytest.raises(TrackingError):
        asked.names()
    # Its end, or that the other side sent more meanwhile, whichever is seen first; either way it ends.
    with suppress(InterruptedStreamError), stream(hostile.address, {}, 0) as (body, _):
        assert body.readinto(memoryview(bytearray(9))) == 0


def test_a_file_has_a_slowest_pace(hostile: Hostile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "ANSWER_SECONDS", 0.1)
    hostile.answer = trickles
    with pytest.raises(TrackingError, match="too slow"):
        download("a", tmp_path / "a", FileRecord(size=1 << 20, sha256="0" * 64),
                 lambda start: stream(hostile.address, {}, start), ByteCount())  # fmt: skip


def test_pages_end(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile.answer = says(json.dumps({"registered_models": [], "next_page_token": "again"}))
    with MlflowServer(hostile.address) as asked, pytest.raises(TrackingError, match="without end: stopped after 0"):
        asked.names()
    monkeypatch.setattr(server, "_MOST_ENTRIES", 10)
    tokens = iter(range(1000))

    def onward(handler: BaseHTTPRequestHandler) -> None:
        page = {"registered_models": [{"name": "a"}], "next_page_token": str(next(tokens))}
        says(json.dumps(page))(handler)

    hostile.answer = onward
    with MlflowServer(hostile.address) as asked, pytest.raises(TrackingError, match="without end: stopped after 11"):
        asked.names()


def test_folders_end(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    deeper = iter(["deeper"] * 50)  # an end after all, for a reader that knows none

    def onward(handler: BaseHTTPRequestHandler) -> None:
        says(json.dumps({"files": [{"path": name, "is_dir": True} for name in itertools.islice(deeper, 1)]}))(handler)

    hostile.answer = onward
    with MlflowServer(hostile.address) as asked:
        with pytest.raises(TrackingError, match="without end: stopped after 17"):
            ServerArtifacts(asked, "root").names()
        monkeypatch.setattr(version_files, "_MOST_ENTRIES", 10)
        hostile.answer = says(json.dumps({"files": [{"path": f"f{n}", "is_dir": False} for n in range(11)]}))
        with pytest.raises(TrackingError, match="without end: stopped after 11"):
            ServerArtifacts(asked, "root").names()


def test_an_endless_manifest_is_refused_before_it_is_parsed() -> None:
    data = b'{"schema":"slipway.release/v1","files":{' + b'"a":{},' * 1_000_000 + b'"b":{}}}'
    tracemalloc.start()
    with pytest.raises(ManifestError, match="more than 30000 values"):
        Manifest.parse(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(data)
    with pytest.raises(ManifestError, match="bytes, of which at most"):
        Manifest.parse(b" " * (BOUNDS.bytes + 1))


def test_a_manifest_of_errors_is_explained_in_short() -> None:
    data = b'{"schema":"slipway.release/v1",' + b",".join(b'"k%d":0' % n for n in range(5000)) + b"}"
    with pytest.raises(ManifestError, match="and 5005 more") as caught:
        Manifest.parse(data)
    assert len(str(caught.value)) < 1000


def test_what_follows_an_alias_survives_every_answer(hostile: Hostile, tmp_path: Path) -> None:
    answers = iter([*map(says, WRONG), says(gzip.compress(b" " * 9999), "gzip")])
    stopped, told = threading.Event(), list[str]()

    def each(handler: BaseHTTPRequestHandler) -> None:
        answer = next(answers, None)
        if answer is None:
            stopped.set()
        (answer or says("{}"))(handler)

    hostile.answer = each
    watch(
        "demo", tmp_path / "out", lambda _: True,
        every=0.0, stopped=stopped, tracking_uri=hostile.address, trusted_keys=[], progress=told.append,
    )  # fmt: skip
    assert len(told) > 5
    assert all(line.startswith("waiting: ") for line in told)
    assert not (tmp_path / "out").exists()


def test_what_follows_an_alias_survives_a_release_that_is_not_what_was_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = iter([VerificationError("demo", [Problem("release", "altered")]), TrackingError("gone")])
    stopped, told = threading.Event(), list[str]()

    def pulled(*_: object, **__: object) -> None:
        problem = next(problems, None)
        if problem is None:
            raise ArgumentError("`demo` can't be used")
        raise problem

    monkeypatch.setattr("registry.watch.pull", pulled)
    with pytest.raises(ArgumentError):
        watch(
            "demo", tmp_path, lambda _: True,
            every=0.0, stopped=stopped, tracking_uri="", trusted_keys=[], progress=told.append,
        )  # fmt: skip
    assert [line.partition(":")[0] for line in told] == ["refused", "waiting"]
