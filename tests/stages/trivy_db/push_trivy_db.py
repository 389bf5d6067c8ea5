"""Push db.tar.gz to a plain-HTTP registry as the OCI artifact that Trivy downloads.

python push_trivy_db.py db.tar.gz 127.0.0.1:5005/trivy-db:2
"""

from __future__ import annotations

import hashlib
import http.client
import json
import sys
import urllib.parse
from collections.abc import Mapping
from email.message import Message
from pathlib import Path
from typing import Any

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.aquasec.trivy.config.v1+json"
LAYER = "application/vnd.aquasec.trivy.db.layer.v1.tar+gzip"


def push_database(archive: Path, reference: str) -> str:
    """Push the archive under ``HOST:PORT/NAME:TAG``; give the manifest's digest."""
    host, rest = reference.split("/", 1)
    name, tag = rest.rsplit(":", 1)
    config = _push_blob(host, name, b"{}", CONFIG, {})
    # Trivy names the downloaded file after this annotation.
    layer = _push_blob(host, name, archive.read_bytes(), LAYER, {"org.opencontainers.image.title": "db.tar.gz"})
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer]}
    headers = _call(host, "PUT", f"/v2/{name}/manifests/{tag}", json.dumps(manifest).encode(), MANIFEST)
    return str(headers["Docker-Content-Digest"])


def _push_blob(host: str, name: str, data: bytes, kind: str, annotations: Mapping[str, str]) -> dict[str, Any]:
    """Upload one blob; give its descriptor."""
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    location = _call(host, "POST", f"/v2/{name}/blobs/uploads/")["Location"]
    place = urllib.parse.urlsplit(location)
    query = "&".join(filter(None, [place.query, "digest=" + digest]))
    _call(host, "PUT", place.path + "?" + query, data)
    return {"mediaType": kind, "digest": digest, "size": len(data), "annotations": dict(annotations)}


def _call(host: str, method: str, path: str, body: bytes = b"", kind: str = "application/octet-stream") -> Message:
    link = http.client.HTTPConnection(host, timeout=30)
    try:
        link.request(method, path, body, {"Content-Type": kind})
        answer = link.getresponse()
        text = answer.read()
    finally:
        link.close()
    if answer.status not in {201, 202}:
        raise RuntimeError(f"{method} {path}: {answer.status} {text[:300]!r}")
    return answer.headers


if __name__ == "__main__":
    print(push_database(Path(sys.argv[1]), sys.argv[2]))
