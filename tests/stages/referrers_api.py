"""A stand-in for a registry with the referrers API: it passes everything on to a real one, and answers for that API.

Debian's docker-registry has no such API. No registry that has it could be had from a package registry.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_REFERRERS = re.compile(r"(?P<path>/v2/.+/referrers/(?P<digest>sha256:[0-9a-f]{64}))(\?from=(?P<start>\d+))?")
# What a page has; a list of more has several.
_PAGE = 4
_INDEX = "application/vnd.oci.image.index.v1+json"
_MANIFEST = re.compile(r"/v2/.+/manifests/.+")


@contextlib.contextmanager
def with_referrers_api(upstream: str) -> Iterator[str]:
    """Serve the registry at ``upstream``, HOST:PORT, with the referrers API; give the address."""
    attached: dict[str, list[dict[str, Any]]] = defaultdict(list)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            asked = _REFERRERS.fullmatch(self.path)
            if asked and self.command == "GET":
                every, start = attached[asked["digest"]], int(asked["start"] or 0)
                listed = {"schemaVersion": 2, "mediaType": _INDEX, "manifests": every[start : start + _PAGE]}
                end = start + _PAGE
                more = {"Link": f'<{asked["path"]}?from={end}>; rel="next"'} if end < len(every) else {}
                self.reply(200, {"Content-Type": _INDEX, **more}, json.dumps(listed).encode())
                return
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            server = http.client.HTTPConnection(upstream)
            with contextlib.closing(server):
                server.request(self.command, self.path, body, dict(self.headers))
                answer = server.getresponse()
                kept = {name: value for name, value in answer.getheaders() if name not in {"Date", "Content-Length"}}
                data = answer.read()
            if self.command == "PUT" and _MANIFEST.fullmatch(self.path) and answer.status == http.client.CREATED:
                kept |= self.attach(body)
            self.reply(answer.status, kept, data, answer.getheader("Content-Length"))

        def attach(self, body: bytes) -> dict[str, str]:
            manifest = json.loads(body)
            if "subject" not in manifest:
                return {}
            subject, digest = manifest["subject"]["digest"], f"sha256:{hashlib.sha256(body).hexdigest()}"
            described = {"mediaType": manifest["mediaType"], "digest": digest, "size": len(body)}
            entry = described | {key: manifest[key] for key in ("artifactType", "annotations") if key in manifest}
            attached[subject] = [each for each in attached[subject] if each["digest"] != digest] + [entry]
            return {"OCI-Subject": subject}

        def reply(self, status: int, headers: dict[str, str], body: bytes, length: str | None = None) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

        do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = handle_any  # noqa: N815 - as http.server has it

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
