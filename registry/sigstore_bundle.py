"""The signature over all of a release's files, as OpenSSF model signing has it (v1.0), in a Sigstore bundle (v0.3).

The chain has one link: whom one trusts, ``release/signature.json``, every file of the release, manifest and provenance
among them. The statement that is signed names each file with its SHA-256; `verify` holds the files to the manifest, and
the statement to both. ``model_signing verify`` checks the same file without Slipway; it and this module are held to
each other by tests. It is read here, and not by that library, since a release is hashed once, while it streams, and
since the puller stays small.

Who signed: a key on a curve, told by the hash of its PEM; or a certificate (`registry.certificates`).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from registry.bounded_json import DocumentError, read_json
from registry.certificates import Authority, signer_of
from registry.digests import canonical_json
from registry.errors import SigningError
from registry.manifest import BOUNDS, SIGNATURE
from registry.provenance import STATEMENT
from registry.signing import PublicKey, SigningKey, encoded

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
IN_TOTO = "application/vnd.in-toto+json"
PREDICATE = "https://model_signing/signature/v1.0"


def files_statement(name: str, digests: Mapping[str, str]) -> bytes:
    """Return model signing's statement that the model ``name`` has these files, path → SHA-256 in hexadecimal."""
    ordered = sorted(digests, key=PurePosixPath)
    root = hashlib.sha256(b"".join(bytes.fromhex(digests[path]) for path in ordered)).hexdigest()
    return canonical_json(
        {
            "_type": STATEMENT,
            "subject": [{"name": name, "digest": {"sha256": root}}],
            "predicateType": PREDICATE,
            "predicate": {
                "serialization": {
                    "method": "files",
                    "hash_type": "sha256",
                    "allow_symlinks": False,
                    "ignore_paths": [SIGNATURE],
                },
                "resources": [{"algorithm": "sha256", "digest": digests[path], "name": path} for path in ordered],
            },
        }
    )


def sign_statement(statement: bytes, key: SigningKey, *, with_chain: bool = True) -> bytes:
    """Return a bundle of the statement, the signature, and the signer.

    OpenSSF model signing has all certificates of the chain in it, Sigstore's own clients accept the signer's alone.
    """
    chain = [{"rawBytes": base64.b64encode(certificate).decode()} for certificate in key.certificates]
    material: dict[str, Any]
    if chain and with_chain:
        material = {"x509CertificateChain": {"certificates": chain}}
    elif chain:
        material = {"certificate": chain[0]}
    else:
        material = {"publicKey": {"hint": key.public.keyid}}
    return canonical_json(
        {
            "mediaType": MEDIA_TYPE,
            "verificationMaterial": {**material, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": base64.b64encode(statement).decode(),
                "payloadType": IN_TOTO,
                "signatures": [
                    {"sig": base64.b64encode(key.sign_raw(encoded(statement, IN_TOTO))).decode(), "keyid": ""}
                ],
            },
        }
    )


def is_bundle(data: bytes) -> bool:
    """Whether a signature file is a bundle. The first releases have a bare envelope."""
    try:
        return "mediaType" in read_json(data, BOUNDS)
    except (DocumentError, TypeError):
        return False


def open_bundle(
    data: bytes,
    keys: Sequence[PublicKey],
    authorities: Sequence[Authority] = (),
    revoked: Sequence[PublicKey] = (),
) -> tuple[str, bytes]:
    """Return who signed (a key's id, or a certificate's name) and the statement.

    Raises:
        SigningError: It is not a bundle, no trusted key signed it, the key is revoked, or it signs other bytes.
    """
    try:
        document = read_json(data, BOUNDS)
        envelope, material = document["dsseEnvelope"], document["verificationMaterial"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        sig = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
        kind = envelope["payloadType"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise SigningError("not a signature: no Sigstore bundle with an envelope in it") from error
    if kind != IN_TOTO:
        raise SigningError(f"signs a `{str(kind)[:60]}`, not an `{IN_TOTO}`")
    key, signer = _signer(material, keys, authorities, revoked)
    if not key.signed(sig, encoded(payload, kind)):
        raise SigningError(f"the signature of {signer[:60]} is not over this statement: one of the two was altered")
    return signer, payload


def payload_of(data: bytes) -> bytes:
    """Return a bundle's statement without checking the signature; empty if it is not a bundle."""
    try:
        return base64.b64decode(read_json(data, BOUNDS)["dsseEnvelope"]["payload"], validate=True)
    except (ValueError, KeyError, TypeError):
        return b""


def files_of(statement: bytes) -> dict[str, str]:
    """Return a statement's files, path → SHA-256 in hexadecimal.

    Raises:
        SigningError: It is another kind of statement, or contradicts itself.
    """
    try:
        document = read_json(statement, BOUNDS)
        resources = document["predicate"]["resources"]
        found = {item["name"]: item["digest"] for item in resources if item["algorithm"] == "sha256"}
        root = hashlib.sha256(b"".join(bytes.fromhex(item["digest"]) for item in resources)).hexdigest()
        agrees = document["subject"][0]["digest"]["sha256"] == root and len(found) == len(resources)
        kinds = (document["_type"], document["predicateType"])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise SigningError("the signed payload is not a statement about a model's files") from error
    if kinds != (STATEMENT, PREDICATE):
        raise SigningError(f"what was signed is a `{str(kinds[1])[:60]}`, not a `{PREDICATE}`")
    if not agrees:
        raise SigningError("the statement over the files contradicts itself")
    return found


def _certificates(material: Any) -> Sequence[Any]:  # noqa: ANN401 - a JSON value
    """The certificates in a bundle: a chain, or the signer's alone."""
    if material.get("certificate"):
        return [material["certificate"]]
    found: Sequence[Any] = (material.get("x509CertificateChain") or {}).get("certificates", ())
    return found


def _signer(
    material: Any,  # noqa: ANN401 - a JSON value
    keys: Sequence[PublicKey],
    authorities: Sequence[Authority],
    revoked: Sequence[PublicKey],
) -> tuple[PublicKey, str]:
    try:
        hint = (material.get("publicKey") or {}).get("hint")
        chain = [base64.b64decode(item["rawBytes"], validate=True) for item in _certificates(material)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SigningError("not a signature: it does not say who signed") from error
    if chain:
        key, signer = signer_of(chain, authorities)
    else:
        key, signer = _named(str(hint), (*revoked, *keys)), str(hint)
    if key in revoked:
        raise SigningError(f"signed by key {key.keyid[:12]}, which is revoked")
    return key, signer


def _named(hint: str, keys: Sequence[PublicKey]) -> PublicKey:
    if not keys:
        raise SigningError("no trusted public key was given to check it against")
    for key in keys:
        if key.keyid == hint:
            return key
    known = ", ".join(f"key {key.keyid[:12]}" for key in keys)
    raise SigningError(f"signed by key {hint[:12]}, which is not trusted (trusted: {known})")
