"""A TCP proxy on loopback that cuts connections in the middle of an answer, and counts what the server sends."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class CuttingProxy:
    """The next ``cuts`` connections are cut before more than ``after`` bytes have come; ``received`` counts all."""

    address: str
    cuts: int = 0
    after: int = 100_000
    received: int = 0


@contextlib.contextmanager
def cutting(upstream: str) -> Iterator[CuttingProxy]:
    """Forward a port of its own to ``upstream``, HOST:PORT."""
    host, _, port = upstream.rpartition(":")

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection((host, int(port))) as there:
                threading.Thread(target=self.ask, args=(there,), daemon=True).start()
                count = 0
                with contextlib.suppress(OSError):
                    while data := there.recv(65536):
                        count += len(data)
                        if proxy.cuts and count > proxy.after:
                            proxy.cuts -= 1
                            return
                        self.request.sendall(data)
                        proxy.received += len(data)

        def ask(self, there: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := self.request.recv(65536):
                    there.sendall(data)
                there.shutdown(socket.SHUT_WR)  # or a server that takes one at a time would wait for more

        def finish(self) -> None:
            with contextlib.suppress(OSError):
                self.request.shutdown(socket.SHUT_RDWR)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

    with Server(("127.0.0.1", 0), Handler) as server:
        proxy = CuttingProxy(f"127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()
