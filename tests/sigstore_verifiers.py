"""Programs that know nothing of Slipway and check what is signed: Sigstore's own verifier for npm, and OpenSSL."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from node_packages import install, node

_PACKAGE = Path(__file__).parent / "sigstore"


class RefusedError(Exception):
    """A verifier refused something; the message is its own."""


@dataclass(frozen=True)
class NpmVerifier:
    """``@sigstore/verify`` and ``@sigstore/bundle``, installed in a folder by their lock, and what calls them."""

    folder: Path

    @classmethod
    def installed(cls, folder: Path) -> NpmVerifier:
        """Install both packages, whose digests the lock has."""
        install(_PACKAGE, folder)
        return cls(folder)

    def verify(
        self,
        reference: str,
        keys: Sequence[bytes],
        required: Sequence[str],
        *,
        authorities: Sequence[bytes] = (),
        maximum_scan_age_days: float = 36_500,
    ) -> dict[str, list[Any]]:
        """Verify ``HOST/NAME@sha256:…`` with PEM keys, without a transparency log; return the predicates by type.

        Raises:
            RefusedError: a layer was changed, a ``required`` statement is missing, a gate blocks, or the scan is old.
        """
        trust = {
            "keys": [key.decode() for key in keys],
            "authorities": [each.decode() for each in authorities],
            "required": list(required),
            "maximumScanAgeDays": maximum_scan_age_days,
        }
        (self.folder / "trust.json").write_text(json.dumps(trust))
        command = [node("node"), "verify.mjs", reference, "trust.json"]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, check=False)
        if done.returncode:
            raise RefusedError(done.stderr.decode().strip())
        found: dict[str, list[Any]] = json.loads(done.stdout)
        return found


def openssl_verifies(bundle: bytes, key: Path, folder: Path) -> bool:
    """Whether OpenSSL finds the key's signature over the bytes that DSSE says are signed."""
    envelope = json.loads(bundle)["dsseEnvelope"]
    kind, payload = envelope["payloadType"].encode(), base64.b64decode(envelope["payload"])
    (folder / "signed").write_bytes(b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload))
    (folder / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    command = ["openssl", "dgst", "-sha256", "-verify", str(key), "-signature", "sig", "signed"]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0
