"""Signatures with certificates: follows the chain from the signer's certificate to a trusted authority.

The chain is judged by the verifier of `cryptography` (RFC 5280: signatures, validity, basic constraints, path lengths,
name constraints, unknown critical extensions), with a policy for signing rather than for TLS:

- an authority's certificate has ``keyCertSign`` where it says what its key is for, and permits code signing where
  it limits its purposes;
- the signer's has ``digitalSignature`` or the purpose of code signing, and neither extension says otherwise;
- the names that a signer goes by are its alternative names; the common name counts only where there are none.

The chain is judged at the moment at which the signer's certificate began to be valid, and that one must have begun and
not have expired by now. Authorities have RSA keys of 2048 bits or more, or keys on P-256, P-384 or P-521. A test holds
this to OpenSSL over a matrix of chains: nothing is accepted that OpenSSL refuses.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from registry.errors import SigningError
from registry.signing import PublicKey

_LONGEST_CHAIN = 8
_Name = type[x509.RFC822Name | x509.UniformResourceIdentifier | x509.DNSName]
_FORMS: Sequence[tuple[_Name, re.Pattern[str]]] = (
    (x509.RFC822Name, re.compile(r"[^@]+@[^@]+")),
    (x509.UniformResourceIdentifier, re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:.+")),
    (x509.DNSName, re.compile(r"[^@:/]+")),
)
_Extension = TypeVar("_Extension", bound=x509.ExtensionType)
# What `cryptography` raises for malformed certificates: one extension twice, a date that is none, a key of no kind.
_MALFORMED = (
    ValueError, TypeError, OverflowError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)  # fmt: skip


@dataclass(frozen=True)
class Authority:
    """A certificate that signs others. ``identities`` are the names that it may sign for; empty: any."""

    certificate: bytes
    identities: tuple[str, ...] = ()


def signer_of(
    chain: Sequence[bytes], authorities: Sequence[Authority], now: datetime | None = None
) -> tuple[PublicKey, str]:
    """Follow the chain to a trusted authority; return the key of its first certificate, and whose that is.

    Args:
        chain: Certificates in DER, the signer's first, then the rest of its chain, in any order.
        authorities: Those that are trusted.
        now: The present, where it is not that of the clock.

    Raises:
        SigningError: No trusted authority signed it, it is not for signing, or it has no accepted name.
    """
    if len(chain) > _LONGEST_CHAIN:
        raise SigningError(f"{len(chain)} certificates are in it, and {_LONGEST_CHAIN} are the most that are read")
    try:
        return _judged(chain, authorities, now or datetime.now(UTC))
    except _MALFORMED as error:
        raise SigningError("a certificate in it can't be read") from error


def names_of(certificate: x509.Certificate) -> list[str]:
    """Return the names that a certificate may be asked for: its alternative names, or else its common name.

    An alternative name counts only in the form of its kind: an authority that is limited to some addresses could
    otherwise sign any other one as a host's name, which its limits do not cover.
    """
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return [str(name.value) for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return [name for kind, form in _FORMS for name in extension.get_values_for_type(kind) if form.fullmatch(name)]


def _judged(chain: Sequence[bytes], authorities: Sequence[Authority], now: datetime) -> tuple[PublicKey, str]:
    own, *others = (x509.load_der_x509_certificate(item) for item in chain)
    trusted = {x509.load_der_x509_certificate(one.certificate): one for one in authorities}
    names = names_of(own)
    called = names[0] if names else own.subject.rfc4514_string() or "a certificate without a name"
    key = own.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not _may_sign(own):
        raise SigningError(f"the certificate of {called} is not for signing")
    path = _path(own, others, list(trusted), called)
    if any(_constrains(certificate) for certificate in path) and not _has_alternative_names(own):
        raise SigningError(f"an authority limits the names that it signs, and the certificate of {called} has none")
    wanted = trusted[path[-1]].identities
    if wanted and not set(names) & set(wanted):
        raise SigningError(f"signed by {' alias '.join(names) or called}, and not by {' or '.join(wanted)}")
    if now < own.not_valid_before_utc:
        raise SigningError(f"the certificate of {called} begins on {own.not_valid_before_utc:%Y-%m-%d}, later than now")
    if own.not_valid_after_utc < now:
        raise SigningError(f"the certificate of {called} expired on {own.not_valid_after_utc:%Y-%m-%d}")
    return PublicKey.of(key), called


def _path(
    own: x509.Certificate, others: list[x509.Certificate], trusted: list[x509.Certificate], called: str
) -> list[x509.Certificate]:
    """Return the certificates from the signer's to the trusted one."""
    if not trusted:
        raise SigningError(f"signed by {called}, whose certificate was not issued by a trusted authority")
    every = verification.ExtensionPolicy.permit_all()
    agnostic = verification.Criticality.AGNOSTIC
    authority = (
        every.require_present(x509.BasicConstraints, agnostic, None)
        .may_be_present(x509.KeyUsage, agnostic, _signs_certificates)
        .may_be_present(x509.ExtendedKeyUsage, agnostic, _for_code)
    )
    verifier = (
        verification.PolicyBuilder()
        .store(verification.Store(trusted))
        .time(own.not_valid_before_utc)
        .max_chain_depth(_LONGEST_CHAIN)
        .extension_policies(ca_policy=authority, ee_policy=every)
        .build_client_verifier()
    )
    try:
        return list(verifier.verify(own, others).chain)
    except verification.VerificationError as error:
        why = str(error).partition(" (encountered")[0].rpartition("candidates exhausted: ")[2]
        raise SigningError(
            f"signed by {called}, whose certificate was not issued by a trusted authority: {why}"
        ) from error


def _signs_certificates(_: verification.Policy, __: x509.Certificate, usage: x509.KeyUsage | None) -> None:
    if usage is not None and not usage.key_cert_sign:
        raise ValueError("its key usage does not permit signing certificates")


def _for_code(_: verification.Policy, __: x509.Certificate, usage: x509.ExtendedKeyUsage | None) -> None:
    if usage is not None and ExtendedKeyUsageOID.CODE_SIGNING not in usage:
        raise ValueError("its extended key usage does not permit code signing")


def _may_sign(certificate: x509.Certificate) -> bool:
    """Whether at least one of the two extensions permits signing, and neither forbids it."""
    key = _extension(certificate, x509.KeyUsage)
    purposes = _extension(certificate, x509.ExtendedKeyUsage)
    allowed = [] if key is None else [key.digital_signature]
    allowed += [] if purposes is None else [ExtendedKeyUsageOID.CODE_SIGNING in purposes]
    return bool(allowed) and all(allowed)


def _constrains(certificate: x509.Certificate) -> bool:
    return _extension(certificate, x509.NameConstraints) is not None


def _has_alternative_names(certificate: x509.Certificate) -> bool:
    return _extension(certificate, x509.SubjectAlternativeName) is not None


def _extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
