"""An HTTP server on loopback that answers as it is told, and keeps what it was asked; over TLS where it has a key."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Asked:
    """One request: the target as it stood in it, and its headers."""

    method: str
    target: str
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    """What is sent back; a body in pieces has no length, and may be endless."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Iterable[bytes] = b""


@dataclass
class Recording:
    """Where it is, what it was asked, and what it answers to a request; by default 404."""

    address: str = ""
    asked: list[Asked] = field(default_factory=list)
    answer: Callable[[Asked], Answer] = lambda _: Answer(404)

    def authorizations(self) -> list[str]:
        """The credentials that came, in order; those of a proxy too."""
        named = ("Authorization", "Proxy-Authorization")
        return [asked.headers[name] for asked in self.asked for name in named if name in asked.headers]


def trickle(piece: bytes = b" ") -> Iterator[bytes]:
    """A body that never ends, a piece at a time, each in time."""
    while True:
        yield piece
        time.sleep(0.02)


@contextmanager
def recording(host: str = "127.0.0.1", certificate: Path | None = None) -> Iterator[Recording]:
    """Serve on an address of this machine; ``certificate`` has the key too, in PEM."""
    kept = Recording()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do(self) -> None:
            asked = Asked(self.command, self.path, {name.title(): value for name, value in self.headers.items()})
            kept.asked.append(asked)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            answer = kept.answer(asked)
            self.send_response(answer.status)
            length = {"Content-Length": str(len(answer.body))} if isinstance(answer.body, bytes) else {}
            for name, value in {**length, **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            with suppress(OSError):  # whoever asked has had enough
                for piece in [answer.body] if isinstance(answer.body, bytes) else answer.body:
                    self.wfile.write(piece)

    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.do)

    server = ThreadingHTTPServer((host, 0), Handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    kept.address = f"{'https' if certificate else 'http'}://{host}:{server.server_address[1]}"
    try:
        yield kept
    finally:
        server.shutdown()
        server.server_close()


def own_certificate(path: Path, host: str = "127.0.0.1") -> Path:
    """Write a key and a certificate for a host that nobody but itself vouches for; it is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 7, now - timedelta(days=1), now + timedelta(days=9))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(host))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(private + made.public_bytes(Encoding.PEM))
    return path
