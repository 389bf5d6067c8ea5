"""Programs that know nothing of Slipway and check Sigstore bundles: Sigstore's own verifier for npm, and OpenSSL."""

from __future__ import annotations

import base64
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from node_packages import install, node

_PACKAGE = Path(__file__).parent / "sigstore"


class RefusedError(Exception):
    """A verifier refused a bundle; the message is its own."""


@dataclass(frozen=True)
class NpmVerifier:
    """``@sigstore/verify`` and ``@sigstore/bundle``, installed in a folder by their lock."""

    folder: Path

    @classmethod
    def installed(cls, folder: Path) -> NpmVerifier:
        """Install both packages, whose digests the lock has."""
        install(_PACKAGE, folder)
        return cls(folder)

    def statement(self, bundle: bytes, key: Path) -> dict[str, Any]:
        """Verify a bundle with a public key and without a transparency log; return the statement.

        Raises:
            RefusedError: it is not a valid bundle, or the key did not sign it.
        """
        path = self.folder / "bundle.json"
        path.write_bytes(bundle)
        command = [node("node"), str(self.folder / "verify.mjs"), str(path), str(key)]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            raise RefusedError(done.stderr.decode().strip())
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def openssl_verifies(bundle: bytes, key: Path, folder: Path) -> bool:
    """Whether OpenSSL finds the signature over the bytes that DSSE says are signed."""
    envelope = json.loads(bundle)["dsseEnvelope"]
    kind, payload = envelope["payloadType"].encode(), base64.b64decode(envelope["payload"])
    (folder / "signed").write_bytes(b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload))
    (folder / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    command = ["openssl", "dgst", "-sha256", "-verify", str(key), "-signature", "sig", "signed"]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0
