"""A small model hub for tests: the few addresses that pulling needs, over real HTTP, with faults on request."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

import hub_cards

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "org/tiny"


class StandInHub:
    """Serves ``files`` (path → bytes) of one model, or data set, at one commit; safetensors are told with their sha256.

    It takes commits, with large files beforehand, and checks model cards by what the real hub documents, with these
    ``warnings``. The ``token`` may read, and ``writer`` write; None is anybody's. ``branches`` name the ``commit``. The
    next ``cuts`` downloads break off in the middle; ``served`` replaces what is sent for a file, not what is told of
    it. ``seen`` has every request: method, path, Range, Authorization.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.kind = "models"
        self.commit = COMMIT
        self.branches = {"main": COMMIT}
        self.token: str | None = None
        self.writer: str | None = None
        self.gated = False
        self.cuts = 0
        self.served: dict[str, bytes] = {}
        self.uploads: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.warnings: list[str] = []
        self.seen: list[tuple[str, str, str | None, str | None]] = []
        self.endpoint = ""

    def information(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(data)}
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return {"id": REPOSITORY, "modelId": REPOSITORY, "sha": self.commit, "siblings": siblings, "tags": []}


@contextlib.contextmanager
def serving(files: dict[str, bytes]) -> Iterator[StandInHub]:
    """Serve a model on loopback."""
    hub = StandInHub(files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            authorization = self.headers.get("Authorization")
            hub.seen.append((self.command, path, self.headers.get("Range"), authorization))
            if hub.gated:
                self.refuse(403, "GatedRepo")
            elif hub.token and authorization != f"Bearer {hub.token}":
                self.refuse(401, "RepoNotFound")
            elif path.startswith(f"/api/{hub.kind}/{REPOSITORY}/revision/"):
                self.describe(path.rsplit("/", 1)[-1])
            elif path.startswith(f"/{'datasets/' * (hub.kind == 'datasets')}{REPOSITORY}/resolve/{hub.commit}/"):
                self.send(path.partition(f"/resolve/{hub.commit}/")[2])
            else:
                self.refuse(404, "RepoNotFound")

        def do_POST(self) -> None:
            path, body = unquote(urlparse(self.path).path), self.rfile.read(int(self.headers["Content-Length"]))
            hub.seen.append((self.command, path, None, self.headers.get("Authorization")))
            if path == "/api/validate-yaml":
                found = [{"message": problem} for problem in hub_cards.problems(json.loads(body)["content"])]
                warnings = [{"message": warning} for warning in hub.warnings]
                self.answer({"errors": found, "warnings": warnings}, 400 if found else 200)
            elif hub.writer and self.headers.get("Authorization") != f"Bearer {hub.writer}":
                self.refuse(403, "Forbidden")
            elif path.startswith(f"/api/models/{REPOSITORY}/preupload/"):
                modes = [
                    {
                        "path": each["path"],
                        "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for each in json.loads(body)["files"]
                ]
                self.answer({"files": modes})
            elif path == f"/{REPOSITORY}.git/info/lfs/objects/batch":
                wanted = json.loads(body)["objects"]
                actions = {each["oid"]: {"upload": {"href": f"{hub.endpoint}/lfs/{each['oid']}"}} for each in wanted}
                self.answer(
                    {"transfer": "basic", "objects": [{**each, "actions": actions[each["oid"]]} for each in wanted]}
                )
            elif path.startswith(f"/api/models/{REPOSITORY}/commit/"):
                self.commit([json.loads(line) for line in body.splitlines()])
            else:
                self.refuse(404, "RepoNotFound")

        def do_PUT(self) -> None:
            hub.uploads[self.path.rsplit("/", 1)[-1]] = self.rfile.read(int(self.headers["Content-Length"]))
            self.answer({})

        def commit(self, lines: list[dict[str, Any]]) -> None:
            if lines[0]["value"].get("parentCommit") not in {None, hub.commit}:
                self.refuse(412, "Precondition")
                return
            for line in lines[1:]:
                value = line["value"]
                large = line["key"] == "lfsFile"
                hub.files[value["path"]] = hub.uploads[value["oid"]] if large else base64.b64decode(value["content"])
            hub.commits.append(lines[0]["value"]["summary"])
            hub.commit = hub.branches["main"] = hashlib.sha1(str(hub.files).encode(), usedforsecurity=False).hexdigest()
            self.answer({"commitUrl": f"{hub.endpoint}/{REPOSITORY}/commit/{hub.commit}", "commitOid": hub.commit})

        def answer(self, document: dict[str, Any], status: int = 200) -> None:
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def describe(self, revision: str) -> None:
            if revision not in {hub.commit, *hub.branches}:
                self.refuse(404, "RevisionNotFound")
                return
            self.answer(hub.information())

        def send(self, name: str) -> None:
            data = hub.served.get(name, hub.files[name])
            wanted = self.headers.get("Range")
            first, _, last = (wanted or "bytes=0-").removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(data)) + 1, len(data))
            self.send_response(206 if wanted else 200)
            self.send_header("ETag", '"etag"')
            self.send_header("X-Repo-Commit", hub.commit)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            body = data[start:end]
            if hub.cuts:
                hub.cuts -= 1
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                return
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
