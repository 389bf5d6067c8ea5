"""Keys, and signatures over one document, in the envelope of DSSE, kept beside what they sign.

What is signed is the pre-authentication encoding of DSSE v1 (https://github.com/secure-systems-lab/dsse, protocol.md):
``"DSSEv1" SP len(type) SP type SP len(body) SP body``, so that a signature over another kind of document never passes
for one over a manifest. In the first releases ``release/signature.json`` is a DSSE envelope without its payload, which
is the manifest file; in later ones it is a bundle (`registry.sigstore_bundle`). Entries of the journal are signed so
as well.
"""

from __future__ import annotations

import base64
import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
    load_pem_private_key,
    load_pem_public_key,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry.atomic_write import create_atomically
from registry.bounded_json import DocumentError, check_bounds
from registry.digests import canonical_json
from registry.errors import SigningError
from registry.manifest import BOUNDS, Hex256

PAYLOAD_TYPE = "application/vnd.slipway.release.v1+json"
_KINDS = "on the curve P-256, P-384 or P-521, or Ed25519"


class KeySignature(BaseModel):
    """One key's signature: ``keyid`` is the SHA-256 of the raw public key, ``sig`` is base64."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keyid: Hex256
    sig: str


class Signature(BaseModel):
    """What ``release/signature.json`` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    payload_type: str = Field(alias="payloadType")
    signatures: Annotated[tuple[KeySignature, ...], Field(min_length=1)]

    def to_bytes(self) -> bytes:
        """Return the file's bytes."""
        return canonical_json(self.model_dump(mode="json", by_alias=True))

    @classmethod
    def parse(cls, data: bytes) -> Signature:
        """Read a signature from its file's bytes.

        Raises:
            SigningError: They are not a signature.
        """
        try:
            check_bounds(data, BOUNDS)
            return cls.model_validate_json(data)
        except DocumentError as error:
            raise SigningError(f"not a signature: {error}") from error
        except ValidationError as error:
            raise SigningError(f"not a signature: {error.error_count()} things are wrong with it") from error


@dataclass(frozen=True)
class PublicKey:
    """A key that signatures are checked against: ``der`` is its SubjectPublicKeyInfo.

    Elliptic curve keys (P-256, P-384, P-521) sign releases as OpenSSF model signing has it, Ed25519 keys sign manifests
    as the first releases had it. Both sign the journal.
    """

    der: bytes

    @classmethod
    def of(cls, key: Ed25519PublicKey | ec.EllipticCurvePublicKey) -> PublicKey:
        """Wrap a key of either kind."""
        return cls(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))

    @property
    def keyid(self) -> str:
        """In hexadecimal: the SHA-256 of a raw Ed25519 key, and of the PEM of any other, as model signing has it."""
        key = self._key
        raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw) if isinstance(key, Ed25519PublicKey) else self.pem()
        return hashlib.sha256(raw).hexdigest()

    def pem(self) -> bytes:
        """Return the key as PEM."""
        return self._key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    @property
    def is_elliptic(self) -> bool:
        """Whether it is an elliptic curve key, which Sigstore's tools take."""
        return not isinstance(self._key, Ed25519PublicKey)

    def signed(self, sig: bytes, data: bytes) -> bool:
        """Whether this key made the signature ``sig`` over ``data``."""
        key = self._key
        try:
            if isinstance(key, Ed25519PublicKey):
                key.verify(sig, data)
            else:
                key.verify(sig, data, ec.ECDSA(_curve_hash(key)))
        except InvalidSignature:
            return False
        return True

    @property
    def _key(self) -> Ed25519PublicKey | ec.EllipticCurvePublicKey:
        key = load_der_public_key(self.der)
        assert isinstance(key, (Ed25519PublicKey, ec.EllipticCurvePublicKey))  # noqa: S101 - nothing else is wrapped
        return key


@dataclass(frozen=True)
class SigningKey:
    """A private key; it is never shown. ``certificates`` say whose it is, its own first, in DER; none is a bare key."""

    _key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey
    certificates: tuple[bytes, ...] = ()

    @property
    def public(self) -> PublicKey:
        """The key that checks what this one signs."""
        return PublicKey.of(self._key.public_key())

    @property
    def signs_models(self) -> bool:
        """Whether it signs as OpenSSF model signing has it, which takes an elliptic curve key."""
        return isinstance(self._key, ec.EllipticCurvePrivateKey)

    def sign(self, payload: bytes, kind: str = PAYLOAD_TYPE) -> Signature:
        """Sign the bytes of a document of this kind: a manifest, where none is named."""
        sig = base64.b64encode(self.sign_raw(encoded(payload, kind))).decode()
        return Signature(payloadType=kind, signatures=(KeySignature(keyid=self.public.keyid, sig=sig),))

    def sign_raw(self, data: bytes) -> bytes:
        """Sign these very bytes; the same bytes give the same signature (RFC 6979)."""
        if isinstance(self._key, Ed25519PrivateKey):
            return self._key.sign(data)
        return self._key.sign(data, ec.ECDSA(_curve_hash(self._key.public_key()), deterministic_signing=True))


def verify_signature(
    signature: Signature, payload: bytes, trusted_keys: Sequence[PublicKey], kind: str = PAYLOAD_TYPE
) -> str:
    """Return the ``keyid`` of the trusted key that signed ``payload``.

    Raises:
        SigningError: The signature is of another kind of document, by no trusted key, or over other bytes.
    """
    if signature.payload_type != kind:
        raise SigningError(f"signs a `{signature.payload_type}`, not a `{kind}`")
    if not trusted_keys:
        raise SigningError("no trusted public key was given to check it against")
    trusted = {key.keyid: key for key in trusted_keys}
    known = [entry for entry in signature.signatures if entry.keyid in trusted]
    if not known:
        signers = ", ".join(_short(entry.keyid) for entry in signature.signatures)
        raise SigningError(f"signed by {signers}, which is not trusted (trusted: {', '.join(map(_short, trusted))})")
    for entry in known:
        if _signed(entry, encoded(payload, kind), trusted[entry.keyid]):
            return entry.keyid
    raise SigningError(
        f"the signature of {_short(known[0].keyid)} is not over this manifest: one of the two was altered"
    )


def load_or_create_key(path: Path) -> SigningKey:
    """Return the key at ``path``, made on first use (P-256), its public half beside it (`public_path`).

    An existing key is never overwritten. Two processes that make it at once get the same one.

    Raises:
        SigningError: The file is not a key that can sign, other users can read it, or its public half is missing and
            can't be written.
    """
    if not os.path.lexists(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        made = ec.generate_private_key(ec.SECP256R1())
        pem = made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        create_atomically(path, pem, 0o600)
    key = load_key(path)
    public = public_path(path)
    if not public.exists():
        try:
            create_atomically(public, key.public.pem(), 0o644)
        except OSError as error:  # such as a mounted Secret that has the private half alone
            raise SigningError(
                f"`{public}` can't be written ({error.strerror}): put the public half of `{path}` there, made with "
                f"`openssl pkey -in {path} -pubout`"
            ) from error
    elif load_public_key(public) != key.public:
        raise SigningError(f"`{public}` is not the public half of `{path}`: remove it, and it is written anew")
    return key


def load_key(path: Path) -> SigningKey:
    """Return the private key at ``path``.

    Only its owner may read it. One of root's may be readable for its group: so Kubernetes mounts a Secret into a pod of
    another user with ``fsGroup``.

    Raises:
        SigningError: It can't be read, others may read it, or it is not a key that can sign.
    """
    try:
        found = path.stat()
        data = path.read_bytes()
    except OSError as error:
        raise SigningError(f"the signing key `{path}` can't be read: {error.strerror}") from error
    mode, is_mounted = stat.S_IMODE(found.st_mode), found.st_uid == 0 != os.geteuid()
    if mode & (0o037 if is_mounted else 0o077):
        advice = f"`chmod {'440' if is_mounted else '600'} {path}`"
        if is_mounted:
            advice += ", or `defaultMode: 0440` where a Secret is mounted"
        raise SigningError(f"the signing key `{path}` has mode {mode:04o}, open to others: {advice}")
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SigningError(f"`{path}` is not an unencrypted private key in PEM: give a PKCS#8 key, {_KINDS}") from error
    if isinstance(key, Ed25519PrivateKey) or (isinstance(key, ec.EllipticCurvePrivateKey) and _is_known(key.curve)):
        return SigningKey(key)
    raise SigningError(f"`{path}` is not a key that can sign a release: expected one {_KINDS}")


def with_certificates(key: SigningKey, path: Path) -> SigningKey:
    """Return the key with the certificates in the PEM file ``path``, its own first, then the rest of its chain.

    Raises:
        SigningError: The file can't be read, or its first certificate is of another key.
    """
    chain = load_certificates(path)
    try:
        own = x509.load_der_x509_certificate(chain[0]).public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SigningError(f"the first certificate in `{path}` has a key that can't be read") from error
    if not isinstance(own, ec.EllipticCurvePublicKey) or PublicKey.of(own) != key.public:
        raise SigningError(f"the first certificate in `{path}` is of another key than the one that signs")
    return replace(key, certificates=chain)


def load_certificates(path: Path) -> tuple[bytes, ...]:
    """Return the certificates in the PEM file ``path``, each in DER.

    Raises:
        SigningError: The file can't be read, or holds none.
    """
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise SigningError(f"the certificate `{path}` can't be read: {error.strerror}") from error
    except ValueError as error:
        raise SigningError(f"`{path}` holds no certificate in PEM") from error
    return tuple(certificate.public_bytes(Encoding.DER) for certificate in found)


def load_public_key(path: Path) -> PublicKey:
    """Return the public key in the PEM file ``path``.

    Raises:
        SigningError: The file can't be read, or is not the key of a signer.
    """
    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise SigningError(f"the public key `{path}` can't be read: {error.strerror}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SigningError(f"`{path}` is not a public key in PEM") from error
    if isinstance(key, Ed25519PublicKey) or (isinstance(key, ec.EllipticCurvePublicKey) and _is_known(key.curve)):
        return PublicKey.of(key)
    raise SigningError(f"`{path}` is not a public key of a signer: expected one {_KINDS}")


def load_trusted_keys(paths: Iterable[Path]) -> tuple[PublicKey, ...]:
    """Return the public keys of ``paths``: PEM files, or folders whose ``*.pub`` files are taken."""
    files = [file for path in paths for file in (sorted(path.glob("*.pub")) if path.is_dir() else [path])]
    return tuple(load_public_key(file) for file in files)


def public_path(path: Path) -> Path:
    """Where the public half of the key at ``path`` is kept: ``release.pem`` has its in ``release.pub``."""
    return path.with_suffix(".pub")


def encoded(payload: bytes, kind: str) -> bytes:
    """Return the pre-authentication encoding of DSSE: what is truly signed."""
    return b"DSSEv1 %d %s %d %s" % (len(kind.encode()), kind.encode(), len(payload), payload)


def _signed(entry: KeySignature, data: bytes, key: PublicKey) -> bool:
    try:
        return key.signed(base64.b64decode(entry.sig, validate=True), data)
    except ValueError:
        return False


def _curve_hash(key: ec.EllipticCurvePublicKey) -> hashes.HashAlgorithm:
    """Return the hash that model signing takes with a curve: as wide as the curve is."""
    return {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}[key.curve.key_size]


def _is_known(curve: ec.EllipticCurve) -> bool:
    return curve.name in ("secp256r1", "secp384r1", "secp521r1")


def _short(keyid: str) -> str:
    return f"key {keyid[:12]}"
