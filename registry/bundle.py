"""The signature over all of a release's files, as OpenSSF model signing has it (v1.0), in a Sigstore bundle (v0.3).

The chain has one link: whom one trusts, ``release/signature.json``, every file of the release, manifest and provenance
among them. The statement that is signed names each file with its SHA-256; `verify` holds the files to the manifest, and
the statement to both. ``model_signing verify`` checks the same file without Slipway; it and this module are held to
each other by tests. It is read here, and not by that library, since a release is hashed once, while it streams, and
since the puller stays small.

Who signed: a key on a curve, told by the hash of its PEM; or a certificate, whose chain ends in one that is trusted,
valid when the signing certificate began to be, and whose subject or alternative name may be asked for.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from registry.errors import SigningError
from registry.manifest import SIGNATURE, canonical_json
from registry.provenance import STATEMENT
from registry.signing import PublicKey, SigningKey, encoded

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
IN_TOTO = "application/vnd.in-toto+json"
PREDICATE = "https://model_signing/signature/v1.0"


@dataclass(frozen=True)
class Authority:
    """A certificate that vouches for others; ``identities`` are the names it may vouch for, none is any."""

    certificate: bytes
    identities: tuple[str, ...] = ()


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


def sign_statement(statement: bytes, key: SigningKey) -> bytes:
    """Return a bundle: the statement, the signature, and who made it."""
    if key.certificates:
        chain = [{"rawBytes": base64.b64encode(certificate).decode()} for certificate in key.certificates]
        material: dict[str, Any] = {"x509CertificateChain": {"certificates": chain}}
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
    """Whether a signature file is a bundle, and not the bare envelope of the first releases."""
    try:
        return "mediaType" in json.loads(data)
    except (ValueError, TypeError, RecursionError):
        return False


def open_bundle(data: bytes, keys: Sequence[PublicKey], authorities: Sequence[Authority] = ()) -> tuple[str, bytes]:
    """Return who signed (a key's id, or a certificate's name) and the statement.

    Raises:
        SigningError: It is no bundle, by nobody who is trusted, or over other bytes.
    """
    try:
        document = json.loads(data)
        envelope, material = document["dsseEnvelope"], document["verificationMaterial"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        sig = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
        kind = envelope["payloadType"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise SigningError("not a signature: no Sigstore bundle with an envelope in it") from error
    if kind != IN_TOTO:
        raise SigningError(f"signs a `{kind}`, not an `{IN_TOTO}`")
    key, signer = _signer(material, keys, authorities)
    if not key.signed(sig, encoded(payload, kind)):
        raise SigningError(f"the signature of {signer[:60]} is not over this statement: one of the two was altered")
    return signer, payload


def payload_of(data: bytes) -> bytes:
    """Return a bundle's statement, whoever signed it; nothing where it is no bundle."""
    try:
        return base64.b64decode(json.loads(data)["dsseEnvelope"]["payload"], validate=True)
    except (ValueError, KeyError, TypeError, RecursionError):
        return b""


def files_of(statement: bytes) -> dict[str, str]:
    """Return what a statement says of a model's files, path → SHA-256 in hexadecimal.

    Raises:
        SigningError: It is another kind of statement, or contradicts itself.
    """
    try:
        document = json.loads(statement)
        resources = document["predicate"]["resources"]
        found = {item["name"]: item["digest"] for item in resources if item["algorithm"] == "sha256"}
        root = hashlib.sha256(b"".join(bytes.fromhex(item["digest"]) for item in resources)).hexdigest()
        agrees = document["subject"][0]["digest"]["sha256"] == root and len(found) == len(resources)
        kinds = (document["_type"], document["predicateType"])
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise SigningError("what was signed is no statement over a model's files") from error
    if kinds != (STATEMENT, PREDICATE):
        raise SigningError(f"what was signed is a `{kinds[1]}`, not a `{PREDICATE}`")
    if not agrees:
        raise SigningError("the statement over the files contradicts itself")
    return found


def _signer(
    material: Any,  # noqa: ANN401 - a JSON value
    keys: Sequence[PublicKey],
    authorities: Sequence[Authority],
) -> tuple[PublicKey, str]:
    try:
        hint = (material.get("publicKey") or {}).get("hint")
        chain = [
            base64.b64decode(item["rawBytes"], validate=True)
            for item in (material.get("x509CertificateChain") or {}).get("certificates", ())
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SigningError("not a signature: it does not say who signed") from error
    if chain:
        return _certified(chain, authorities)
    if not keys:
        raise SigningError("no trusted public key was given to check it against")
    for key in keys:
        if key.keyid == hint:
            return key, hint
    trusted = ", ".join(f"key {key.keyid[:12]}" for key in keys)
    raise SigningError(f"signed by key {str(hint)[:12]}, which is not trusted (trusted: {trusted})")


def _certified(chain: Sequence[bytes], authorities: Sequence[Authority]) -> tuple[PublicKey, str]:
    """Follow the chain to a trusted authority; return the key of its first certificate, and whose that is."""
    try:
        certificates = [x509.load_der_x509_certificate(item) for item in chain]
        trusted = [(x509.load_der_x509_certificate(one.certificate), one) for one in authorities]
    except ValueError as error:
        raise SigningError("a certificate in it can't be read") from error
    own = certificates[0]
    at = own.not_valid_before_utc
    last = own
    for following in certificates[1:]:
        if not _vouches(following, last, at):
            break
        last = following
    key, called = own.public_key(), names_of(own)
    if not isinstance(key, ec.EllipticCurvePublicKey) or not _may_sign(own):
        raise SigningError(f"the certificate of {called[0]} is not for signing")
    for certificate, authority in trusted:
        if not (certificate == last or _vouches(certificate, last, at)):
            continue
        if authority.identities and not set(called) & set(authority.identities):
            wanted = " or ".join(authority.identities)
            raise SigningError(f"signed by {' alias '.join(called)}, and not by {wanted}")
        if own.not_valid_after_utc < datetime.now(UTC):
            raise SigningError(f"the certificate of {called[0]} expired on {own.not_valid_after_utc:%Y-%m-%d}")
        return PublicKey.of(key), called[0]
    raise SigningError(f"signed by {called[0]}, for whom no trusted certificate vouches")


def names_of(certificate: x509.Certificate) -> list[str]:
    """Return the names a certificate goes by: alternative names, then the common name; at least one."""
    found: list[str] = []
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        for kind in (x509.RFC822Name, x509.UniformResourceIdentifier, x509.DNSName):
            found += extension.get_values_for_type(kind)
    except x509.ExtensionNotFound:
        pass
    found += [str(name.value) for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return found or [certificate.subject.rfc4514_string() or "somebody without a name"]


def _vouches(issuer: x509.Certificate, subject: x509.Certificate, at: datetime) -> bool:
    """Whether ``issuer`` is an authority, valid at the time, that signed ``subject``."""
    try:
        constraints = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value
        subject.verify_directly_issued_by(issuer)
    except (x509.ExtensionNotFound, ValueError, TypeError, InvalidSignature):
        return False
    return constraints.ca and issuer.not_valid_before_utc <= at <= issuer.not_valid_after_utc


def _may_sign(certificate: x509.Certificate) -> bool:
    try:
        if certificate.extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature:
            return True
    except x509.ExtensionNotFound:
        pass
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return False
    return ExtendedKeyUsageOID.CODE_SIGNING in usage
