"""A webhook on loopback, as a chat has it: keeps what it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Webhook:
    """Where it is, and what it was told; it answers 503 until ``busy`` times are over."""

    def __init__(self) -> None:
        self.url = ""
        self.busy = 0
        self.texts: list[str] = []


@contextmanager
def listening() -> Iterator[Webhook]:
    """Take what is posted."""
    webhook = Webhook()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            webhook.busy -= 1
            if webhook.busy < 0:
                webhook.texts.append(body["text"])
            self.send_response(503 if webhook.busy >= 0 else 200)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    webhook.url = f"http://127.0.0.1:{server.server_address[1]}/services/T0/secret"
    try:
        yield webhook
    finally:
        server.shutdown()
        server.server_close()
