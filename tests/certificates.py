"""A root, an authority below it and a signer below that, for the tests of who signed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from registry.policy import Policy
from registry.signing import SigningKey, load_or_create_key, with_certificates

NOW = datetime.now(UTC)


def certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: tuple[str, ec.EllipticCurvePrivateKey],
    *,
    ca: bool,
    days: tuple[int, int] = (-1, 30),
    usage: bool = True,
) -> bytes:
    """A certificate in PEM."""
    built = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer[0])]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + timedelta(days=days[0]))
        .not_valid_after(NOW + timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if ca:
        own = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        built = built.add_extension(own, critical=True)
    elif usage:
        own = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
        built = built.add_extension(own, critical=True)
        built = built.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
        built = built.add_extension(x509.SubjectAlternativeName([x509.RFC822Name(name)]), critical=False)
    return built.sign(issuer[1], SHA256()).public_bytes(Encoding.PEM)


class Signers:
    """A root, an authority below it, and a signer below that; each a key and a certificate."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root, self.middle = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        (folder / "root.pem").write_bytes(certificate("root", self.root, ("root", self.root), ca=True, days=(-9, 99)))
        self.authority = certificate("middle", self.middle, ("root", self.root), ca=True, days=(-5, 60))
        self.key = load_or_create_key(folder / "own.pem")
        self.own: Any = self.key._key

    def signer(self, **options: Any) -> SigningKey:  # noqa: ANN401 - those of `certificate`
        """The signing key, with its chain."""
        own = certificate("release@example.com", self.own, ("middle", self.middle), ca=False, **options)
        (self.folder / "chain.pem").write_bytes(own + self.authority)
        return with_certificates(self.key, self.folder / "chain.pem")

    def policy(self, *identities: str, trusted: str = "root.pem") -> Policy:
        """Trust the root alone."""
        listed = ", ".join(f'"{identity}"' for identity in identities)
        path = self.folder / "policy.toml"
        path.write_text(f'[signers]\ncertificates = ["{trusted}"]\nidentities = [{listed}]\n')
        return Policy.load(path)
