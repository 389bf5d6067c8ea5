"""A stand-in for a model server whose behaviour is known: what the load stage measures can be held against it.

Speaks as much of the OpenAI completions API as the load stage uses, streaming and not. By hand:
``python scripted_server.py --service-ms 50 --tokens 8 --error-every 10``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import mmap
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Script:
    """How the server behaves: every token takes ``service_ms / tokens``, the first one included.

    ``workers`` serve first come first served, each one request at a time (0: as many as come); ``error_every`` n
    answers each n-th streamed request with HTTP 500; ``die_after`` n ends the process at the n-th; ``stall_at``
    (seconds after the first streamed request) holds every answer for ``stall_seconds``; ``allocate_mib`` is taken at
    the start and kept, ``leak_kib`` at each streamed request; ``/health`` is 200 from ``healthy_after`` seconds on,
    never if that is below 0. ``says`` is printed at the start. ``fail_at`` n is how vLLM fails when its engine does:
    at the n-th completion it writes what is in the file ``log``, answers 500 and ends with status 0 a moment later;
    with 0 it writes that at its start and ends with status 1. ``illegal`` executes an instruction that no CPU has.
    """

    service_ms: float = 50.0
    tokens: int = 8
    text: str = "the continuation"
    error_every: int = 0
    die_after: int = 0
    stall_at: float = 0.0
    stall_seconds: float = 0.0
    allocate_mib: int = 0
    workers: int = 0
    leak_kib: int = 0
    healthy_after: float = 0.0
    context: int = 2048
    says: str = ""
    name: str = "scripted"
    fail_at: int = -1
    log: str = ""
    illegal: int = 0


class _Line:
    """Lets ``places`` in at a time, in the order in which they came; a semaphore's late comers may overtake."""

    def __init__(self, places: int) -> None:
        self.free = places
        self.lock = threading.Lock()
        self.waiting: deque[threading.Event] = deque()

    def __enter__(self) -> None:
        with self.lock:
            if self.free:
                self.free -= 1
                return
            turn = threading.Event()
            self.waiting.append(turn)
        turn.wait()

    def __exit__(self, *_: object) -> None:
        with self.lock:
            if self.waiting:
                self.waiting.popleft().set()
            else:
                self.free += 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def __init__(self, script: Script, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((host, port), _Handler)
        self.script = script
        self.held = b"x" * (script.allocate_mib << 20)
        self.leaked: list[bytes] = []
        self.line: contextlib.AbstractContextManager[None] = (
            _Line(script.workers) if script.workers else contextlib.nullcontext()
        )
        self.started = time.monotonic()
        self.streamed = itertools.count(1)
        self.completions = itertools.count(1)
        self.first = 0.0
        self.lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Else the first token waits 40 ms behind the head, for the client's delayed acknowledgement.
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        script = self.server.script
        if self.path == "/health":
            late = script.healthy_after
            healthy = late >= 0 and time.monotonic() - self.server.started >= late
            self._answer(200 if healthy else 503, b"", "text/plain")
        elif self.path == "/v1/models":
            self._answer(200, json.dumps({"data": [{"id": script.name, "max_model_len": script.context}]}).encode())
        else:
            self._answer(404, b"{}")

    def do_POST(self) -> None:
        wrong = None
        try:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        except ValueError:
            wrong = 400
        else:
            wrong = 404 if request["model"] != self.server.script.name else None
            # A token a word, as far as this server is concerned.
            prompt = request["prompt"]
            length = len(prompt.split()) if isinstance(prompt, str) else max(map(len, prompt))
            wrong = 400 if length > self.server.script.context else wrong
        if wrong:
            self._answer(wrong, b'{"error": {"message": "scripted refusal"}}')
        elif self._has_failed():
            message = "EngineCore encountered an issue. See stack trace (above) for the root cause."
            self._answer(500, json.dumps({"error": {"message": message, "code": 500}}).encode())
        elif not request.get("stream"):
            body = {"object": "text_completion", "choices": [{"text": self.server.script.text}]}
            self._answer(200, json.dumps(body).encode())
        else:
            self._work(request)

    def _has_failed(self) -> bool:
        script = self.server.script
        with self.server.lock:
            number = next(self.server.completions)
        if script.fail_at < 1 or number < script.fail_at:
            return False
        if number == script.fail_at:
            sys.stderr.write(Path(script.log).read_text())
            sys.stderr.flush()
            threading.Timer(1.0, lambda: os._exit(0)).start()
        return True

    def _work(self, request: dict[str, Any]) -> None:
        script = self.server.script
        with self.server.lock:
            number = next(self.server.streamed)
            self.server.first = self.server.first or time.monotonic()
        if script.die_after and number >= script.die_after:
            os._exit(9)
        if script.error_every and number % script.error_every == 0:
            self._answer(500, b'{"error": {"message": "scripted"}}')
            return
        if script.leak_kib:
            self.server.leaked.append(os.urandom(script.leak_kib << 10))
        with self.server.line:
            self._stall()
            self._stream(script, int(request.get("max_tokens") or script.tokens))

    def _stall(self) -> None:
        script = self.server.script
        end = self.server.first + script.stall_at + script.stall_seconds
        if script.stall_seconds and self.server.first + script.stall_at <= time.monotonic() < end:
            time.sleep(end - time.monotonic())

    def _stream(self, script: Script, tokens: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        started = time.monotonic()
        for index in range(1, tokens + 1):
            time.sleep(max(0.0, started + script.service_ms / 1000 * index / tokens - time.monotonic()))
            finish = "length" if index == tokens else None
            self._event({"object": "text_completion", "choices": [{"text": "x ", "index": 0, "finish_reason": finish}]})
        usage = {"prompt_tokens": 8, "completion_tokens": tokens, "total_tokens": 8 + tokens}
        self._event({"object": "text_completion", "choices": [], "usage": usage})
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, body: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(body).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Requests are not logged."""


@contextlib.contextmanager
def serving(script: Script) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serve in a process of its own; gives the URL and the process."""
    options = [part for name, value in vars(script).items() for part in ("--" + name.replace("_", "-"), str(value))]
    process = subprocess.Popen([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}", process
    finally:
        process.kill()
        process.communicate()


def _execute(instructions: bytes) -> None:
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(instructions)
    ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    for name, default in vars(Script()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    options = vars(parser.parse_args())
    if options["illegal"]:
        _execute(b"\x0f\x0b")  # x86's ud2
    if options["fail_at"] == 0:
        sys.exit(Path(options["log"]).read_text())
    server = _Server(host=options.pop("host"), port=options.pop("port"), script=Script(**options))
    print(server.server_address[1], *filter(None, [server.script.says]), sep="\n", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    sys.exit(0)


if __name__ == "__main__":
    _main()
