"""Chains of certificates: what OpenSSL refuses is refused, and so is what signs something else than releases."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from registry.certificates import Authority, signer_of
from registry.errors import SigningError

NOW = datetime.now(UTC)
AUTHORITY = x509.BasicConstraints(True, None)
KEYS = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("root", "middle", "lower", "leaf", "other")}
CODE = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])
TLS = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
SIGNS = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
ENCRYPTS = x509.KeyUsage(False, False, True, False, False, False, False, False, False)
VOUCHES = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
EMAIL = x509.SubjectAlternativeName([x509.RFC822Name("release@example.com")])


@dataclass(frozen=True)
class One:
    """A certificate to be: an authority's, or the leaf's; None leaves an extension out."""

    name: str
    issuer: str
    constraints: x509.BasicConstraints | None = AUTHORITY
    usage: x509.KeyUsage | None = VOUCHES
    more: tuple[tuple[x509.ExtensionType, bool], ...] = ()
    days: tuple[int, int] = (-9, 99)
    signed_by: str = ""

    def made(self) -> x509.Certificate:
        built = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.issuer)]))
            .public_key(KEYS[self.name].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW + timedelta(days=self.days[0]))
            .not_valid_after(NOW + timedelta(days=self.days[1]))
        )
        if self.constraints is not None:
            built = built.add_extension(self.constraints, critical=True)
        if self.usage is not None:
            built = built.add_extension(self.usage, critical=True)
        for extension, critical in self.more:
            built = built.add_extension(extension, critical)
        return built.sign(KEYS[self.signed_by or self.issuer], SHA256())


@dataclass(frozen=True)
class Chain:
    """A root, an authority below it, one below that and a leaf."""

    root: One = One("root", "root")
    middle: One = One("middle", "root")
    lower: One = One("lower", "middle")
    leaf: One = One(
        "leaf", "lower", x509.BasicConstraints(False, None), SIGNS, ((CODE, False), (EMAIL, False)), (-1, 30)
    )
    left_out: tuple[str, ...] = field(default=())

    def certificates(self) -> dict[str, x509.Certificate]:
        return {one.name: one.made() for one in (self.leaf, self.lower, self.middle, self.root)}


def limited(*, permitted: str = "", excluded: str = "") -> tuple[x509.ExtensionType, bool]:
    """A constraint on addresses, that of a host or of a domain."""
    return x509.NameConstraints(
        [x509.RFC822Name(permitted)] if permitted else None, [x509.RFC822Name(excluded)] if excluded else None
    ), True


GOOD = Chain()
LEAF, MIDDLE = GOOD.leaf, GOOD.middle
# What is wrong, by what both say of it: OpenSSL refuses the first kind, and knows no purpose of signing for the second.
BAD: Mapping[str, Chain] = {
    "signed by another key": replace(GOOD, lower=replace(GOOD.lower, signed_by="other")),
    "issued by no authority": replace(GOOD, lower=replace(GOOD.lower, constraints=x509.BasicConstraints(False, None))),
    "issuer without constraints": replace(GOOD, lower=replace(GOOD.lower, constraints=None)),
    "root that is no authority": replace(GOOD, root=replace(GOOD.root, constraints=x509.BasicConstraints(False, None))),
    "path of 0 in the root": replace(GOOD, root=replace(GOOD.root, constraints=x509.BasicConstraints(True, 0))),
    "path of 0 in the middle": replace(GOOD, middle=replace(MIDDLE, constraints=x509.BasicConstraints(True, 0))),
    "issuer may not sign certificates": replace(GOOD, lower=replace(GOOD.lower, usage=SIGNS)),
    "middle may not sign certificates": replace(GOOD, middle=replace(MIDDLE, usage=SIGNS)),
    "another domain is permitted": replace(GOOD, middle=replace(MIDDLE, more=(limited(permitted="other.com"),))),
    "its domain is excluded": replace(GOOD, root=replace(GOOD.root, more=(limited(excluded="example.com"),))),
    "another mailbox is permitted": replace(
        GOOD, lower=replace(GOOD.lower, more=(limited(permitted="a@example.com"),))
    ),
    "unknown critical extension in the leaf": replace(GOOD, leaf=replace(LEAF, more=(*LEAF.more, (UNKNOWN, True)))),
    "unknown critical extension above": replace(GOOD, middle=replace(MIDDLE, more=((UNKNOWN, True),))),
    "authority expired before": replace(GOOD, middle=replace(MIDDLE, days=(-9, -2))),
    "authority began later": replace(GOOD, middle=replace(MIDDLE, days=(0, 9))),
    "link missing": replace(GOOD, left_out=("middle",)),
}
NOT_FOR_SIGNING: Mapping[str, Chain] = {
    "a server's, for TLS": replace(GOOD, leaf=replace(LEAF, more=((TLS, False), (EMAIL, False)))),
    "a server's without key usage": replace(GOOD, leaf=replace(LEAF, usage=None, more=((TLS, False), (EMAIL, False)))),
    "a key that encrypts": replace(GOOD, leaf=replace(LEAF, usage=ENCRYPTS)),
    "no word of its purpose": replace(GOOD, leaf=replace(LEAF, usage=None, more=((EMAIL, False),))),
    "an authority for servers": replace(GOOD, lower=replace(GOOD.lower, more=((TLS, False),))),
    "limited names, and a leaf without": replace(
        GOOD, middle=replace(MIDDLE, more=(limited(permitted="other.com"),)), leaf=replace(LEAF, more=((CODE, False),))
    ),
}
FINE: Mapping[str, Chain] = {
    "plain": GOOD,
    "authority says nothing of its key": replace(GOOD, middle=replace(MIDDLE, usage=None)),
    "long enough a path": replace(GOOD, middle=replace(MIDDLE, constraints=x509.BasicConstraints(True, 1))),
    "its domain is permitted": replace(GOOD, middle=replace(MIDDLE, more=(limited(permitted="example.com"),))),
    "another domain is excluded": replace(GOOD, middle=replace(MIDDLE, more=(limited(excluded="other.com"),))),
    "unknown extension that is not critical": replace(GOOD, leaf=replace(LEAF, more=(*LEAF.more, (UNKNOWN, False)))),
    "purpose alone": replace(GOOD, leaf=replace(LEAF, usage=None)),
    "authority for code": replace(GOOD, middle=replace(MIDDLE, more=((CODE, False),))),
}


def judged(chain: Chain, *identities: str) -> str:
    """Who signed, as we see it."""
    found = chain.certificates()
    sent = [found[name] for name in ("leaf", "lower", "middle") if name not in chain.left_out]
    der = [certificate.public_bytes(Encoding.DER) for certificate in sent]
    return signer_of(der, [Authority(found["root"].public_bytes(Encoding.DER), identities)])[1]


def openssl_accepts(chain: Chain, folder: Path) -> bool:
    """What ``openssl verify`` says, at the moment at which the leaf began."""
    found = chain.certificates()
    for name, certificate in found.items():
        (folder / f"{name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    untrusted = [name for name in ("lower", "middle") if name not in chain.left_out]
    (folder / "untrusted.pem").write_bytes(b"".join((folder / f"{name}.pem").read_bytes() for name in untrusted))
    at = str(int(found["leaf"].not_valid_before_utc.timestamp()))
    command: list[str | Path] = ["openssl", "verify", "-x509_strict", "-attime", at, "-CAfile", folder / "root.pem"]
    ended = subprocess.run(
        [*command, "-untrusted", folder / "untrusted.pem", folder / "leaf.pem"], check=False, capture_output=True
    )
    return ended.returncode == 0


@pytest.mark.parametrize("what", FINE)
def test_what_is_fine_is_accepted(what: str) -> None:
    assert judged(FINE[what]) == "release@example.com"


@pytest.mark.parametrize("what", BAD)
def test_what_openssl_refuses_is_refused(what: str, tmp_path: Path) -> None:
    assert not openssl_accepts(BAD[what], tmp_path)
    with pytest.raises(SigningError, match="whose certificate was not issued by a trusted authority"):
        judged(BAD[what])


@pytest.mark.parametrize("what", NOT_FOR_SIGNING)
def test_what_is_not_for_signing_is_refused(what: str) -> None:
    with pytest.raises(SigningError, match=r"not for signing|limits the names|permit code signing"):
        judged(NOT_FOR_SIGNING[what])


def test_openssl_accepts_what_the_matrix_calls_fine_without_its_strict_rules(tmp_path: Path) -> None:
    found = GOOD.certificates()
    for name, certificate in found.items():
        (tmp_path / f"{name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    both = (tmp_path / "lower.pem").read_bytes() + (tmp_path / "middle.pem").read_bytes()
    (tmp_path / "untrusted.pem").write_bytes(both)
    command: list[str | Path] = [
        "openssl",
        "verify",
        "-CAfile",
        tmp_path / "root.pem",
        "-untrusted",
        tmp_path / "untrusted.pem",
    ]
    assert subprocess.run([*command, tmp_path / "leaf.pem"], check=False, capture_output=True).returncode == 0


def test_the_common_name_counts_only_where_there_is_no_alternative_name() -> None:
    assert judged(GOOD, "release@example.com") == "release@example.com"
    with pytest.raises(SigningError, match="not by leaf"):
        judged(GOOD, "leaf")
    address = x509.SubjectAlternativeName([x509.DirectoryName(x509.Name([]))])
    other = replace(GOOD, leaf=replace(LEAF, more=((CODE, False), (address, False))))
    with pytest.raises(SigningError, match="not by leaf"):
        judged(other, "leaf")
    bare = replace(GOOD, leaf=replace(LEAF, more=((CODE, False),)))
    assert judged(bare, "leaf") == "leaf"


def test_an_authority_in_the_middle_and_the_certificate_itself_can_be_trusted() -> None:
    found = {name: one.public_bytes(Encoding.DER) for name, one in GOOD.certificates().items()}
    for trusted in ("middle", "lower", "leaf"):
        sent = [found["leaf"], found["lower"]]
        assert signer_of(sent, [Authority(found[trusted])])[1] == "release@example.com"


def test_a_certificate_that_has_expired_signs_nothing_now() -> None:
    found = GOOD.certificates()
    sent = [found[name].public_bytes(Encoding.DER) for name in ("leaf", "lower", "middle")]
    root = [Authority(found["root"].public_bytes(Encoding.DER))]
    assert signer_of(sent, root, NOW + timedelta(days=29))
    with pytest.raises(SigningError, match="expired on"):
        signer_of(sent, root, NOW + timedelta(days=31))


def test_a_certificate_that_has_not_begun_signs_nothing_yet() -> None:
    with pytest.raises(SigningError, match=r"begins on .*, later than now"):
        judged(replace(GOOD, leaf=replace(LEAF, days=(1, 30))))


@pytest.mark.parametrize(
    "name",
    [x509.DNSName("boss@example.com"), x509.UniformResourceIdentifier("boss@example.com"), x509.RFC822Name("a.b")],
)
def test_an_alternative_name_of_another_kinds_form_counts_for_nothing(name: x509.GeneralName) -> None:
    """An authority that is limited to the addresses of one domain would vouch for those of another."""
    names = (x509.SubjectAlternativeName([name]), False)
    middle = replace(MIDDLE, more=(limited(permitted="other.com"),))
    chain = replace(GOOD, middle=middle, leaf=replace(LEAF, more=((CODE, False), names)))
    with pytest.raises(SigningError):
        judged(chain, "boss@example.com", "a.b")


def test_too_many_certificates_are_not_read() -> None:
    leaf = GOOD.certificates()["leaf"].public_bytes(Encoding.DER)
    with pytest.raises(SigningError, match="9 certificates are in it"):
        signer_of([leaf] * 9, [Authority(leaf)])


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")  # of a serial number below 1
def test_whatever_byte_of_a_certificate_is_changed_nothing_but_a_refusal_is_raised() -> None:
    made = GOOD.certificates()
    found = {name: one.public_bytes(Encoding.DER) for name, one in made.items()}
    root = [Authority(found["root"])]
    for name in ("leaf", "lower"):
        for at in range(len(found[name])):
            for change in (0x01, 0x20, 0xFF):
                spoiled = bytearray(found[name])
                spoiled[at] ^= change
                sent = [bytes(spoiled) if item == name else found[item] for item in ("leaf", "lower", "middle")]
                signed = at < found[name].index(made[name].tbs_certificate_bytes) + len(
                    made[name].tbs_certificate_bytes
                )
                # Behind it a changed byte may be padding that means nothing.
                with pytest.raises(SigningError) if signed else suppress(SigningError):
                    signer_of(sent, root)


def _twice(leaf: bytes) -> bytes:
    """Let the second extension be of the first one's kind."""
    certificate = x509.load_der_x509_certificate(leaf)
    kinds = [bytes.fromhex("0603551d13"), bytes.fromhex("0603551d0f")]  # basic constraints, key usage
    assert len(certificate.extensions) > 1
    return leaf.replace(kinds[0], kinds[1])


def _no_date(leaf: bytes) -> bytes:
    year = f"{NOW + timedelta(days=30):%y%m%d}".encode()
    return leaf.replace(year, b"990230")


def _no_key(leaf: bytes) -> bytes:
    return leaf.replace(bytes.fromhex("06072a8648ce3d0201"), bytes.fromhex("06072a8648ce3d0209"))


def _no_names(leaf: bytes) -> bytes:
    return leaf.replace(b"\x81\x13release@example.com", b"\x81\x13release@example.c\xff\xff")


@pytest.mark.parametrize("spoil", [_twice, _no_date, _no_key, _no_names])
def test_a_malformed_certificate_is_refused_in_one_line(spoil: Callable[[bytes], bytes]) -> None:
    found = {name: one.public_bytes(Encoding.DER) for name, one in GOOD.certificates().items()}
    spoiled = spoil(found["leaf"])
    assert spoiled != found["leaf"]
    for sent, trusted in (([spoiled, found["lower"], found["middle"]], found["root"]), ([spoiled], spoiled)):
        with pytest.raises(SigningError):
            signer_of(sent, [Authority(trusted)])


def test_a_key_that_signs_no_releases_is_refused() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "leaf")])
    built = x509.CertificateBuilder(name, name, key.public_key(), 1, NOW - timedelta(days=1), NOW + timedelta(days=9))
    made = built.add_extension(SIGNS, critical=True).sign(key, None).public_bytes(Encoding.DER)
    with pytest.raises(SigningError, match="not for signing"):
        signer_of([made], [Authority(made)])
