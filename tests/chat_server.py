"""A stand-in for a model server that answers chat requests as a test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def chat_server(choose: Callable[[dict[str, Any]], dict[str, Any]], tokens: int) -> Iterator[str]:
    """Serve on loopback: each request's body is given to ``choose``, which returns the one choice of the answer.

    Answers say that they have so many ``tokens``. Yields the server's address.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": "scripted", "max_model_len": 2048}]})

        def do_POST(self) -> None:
            choice = choose(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.answer({"choices": [choice], "usage": {"prompt_tokens": 300, "completion_tokens": tokens}})

        def answer(self, document: dict[str, Any]) -> None:
            data = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Write nothing."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # the worker opens many connections at once

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
