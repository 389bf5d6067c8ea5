"""The signature is OpenSSF's: its library verifies ours and we verify its; who signed is asked, by key or by name."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from certificates import Signers, certificate
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from model_signing import hashing, signing, verifying
from release_folder import make_release, passing

from registry import VerificationError, verify
from registry.errors import SigningError
from registry.provenance import statement
from registry.seal import seal
from registry.signing import SigningKey, load_certificates, load_key, with_certificates
from registry.sigstore_bundle import files_of, open_bundle, sign_statement
from registry.verdict import Verdict

SIGNATURE = "release/signature.json"
NOW = datetime.now(UTC)


def reads(folder: Path, *, key: Path | None = None, authority: Path | None = None) -> None:
    """Verify as ``model_signing verify`` does."""
    config = verifying.Config()
    if key is not None:
        config = config.use_elliptic_key_verifier(public_key=key)
    if authority is not None:
        config = config.use_certificate_verifier(certificate_chain=[authority])
    config.verify(folder, folder / SIGNATURE)


def test_the_library_verifies_what_we_sign(release: Path, signing_key: SigningKey, tmp_path: Path) -> None:
    (tmp_path / "key.pub").write_bytes(signing_key.public.pem())
    reads(release, key=tmp_path / "key.pub")
    (release / "config.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match="mismatch"):
        reads(release, key=tmp_path / "key.pub")


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_we_verify_what_the_library_signs(release: Path, tmp_path: Path, curve: ec.EllipticCurve) -> None:
    private = tmp_path / "key.pem"
    made = ec.generate_private_key(curve)
    private.write_bytes(made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    private.chmod(0o600)
    (release / SIGNATURE).unlink()
    config = hashing.Config().set_ignored_paths(paths=[Path(SIGNATURE)], ignore_git_paths=False)
    signing.Config().use_elliptic_key_signer(private_key=private).set_hashing_config(config).sign(
        release, release / SIGNATURE
    )
    key = load_key(private).public
    assert verify(release, [key]).keyid == key.keyid
    (release / "config.json").write_bytes(b"{}")
    with pytest.raises(VerificationError, match=r"config\.json: changed"):
        verify(release, [key])


@pytest.fixture
def signers(tmp_path: Path) -> Signers:
    (tmp_path / "keys").mkdir()
    return Signers(tmp_path / "keys")


def test_a_certificate_signs_for_whom_it_names(signers: Signers, tmp_path: Path) -> None:
    make_release(tmp_path / "release", signers.signer())
    assert verify(tmp_path / "release", signers.policy()).keyid == "release@example.com"
    verify(tmp_path / "release", signers.policy("release@example.com"))
    reads(tmp_path / "release", authority=signers.folder / "root.pem")
    with pytest.raises(VerificationError, match=r"signed by release@example\.com.*not by other@example\.com"):
        verify(tmp_path / "release", signers.policy("other@example.com"))
    with pytest.raises(VerificationError, match="whose certificate was not issued by a trusted authority"):
        verify(tmp_path / "release", [])


def _other_root(signers: Signers) -> None:
    signers.root = ec.generate_private_key(ec.SECP256R1())
    (signers.folder / "root.pem").write_bytes(certificate("root", signers.root, ("root", signers.root), ca=True))


@pytest.mark.parametrize(
    ("options", "spoil", "message"),
    [
        ({}, _other_root, "was not issued by a trusted authority"),
        ({"usage": False}, lambda _: None, "not for signing"),
        ({"days": (-4, -2)}, lambda _: None, "expired"),
        ({"days": (-7, 30)}, lambda _: None, "was not issued by a trusted authority"),  # older than the authority
    ],
    ids=["another root", "not for signing", "expired", "before its authority was"],
)
def test_a_certificate_that_does_not_hold_is_refused(
    signers: Signers, tmp_path: Path, options: dict[str, Any], spoil: Callable[[Signers], None], message: str
) -> None:
    make_release(tmp_path / "release", signers.signer(**options))
    spoil(signers)
    with pytest.raises(VerificationError, match=message):
        verify(tmp_path / "release", signers.policy())


def test_a_certificate_of_another_key_signs_nothing(signers: Signers, signing_key: SigningKey) -> None:
    signers.signer()
    with pytest.raises(SigningError, match="of another key"):
        with_certificates(signing_key, signers.folder / "chain.pem")
    with pytest.raises(SigningError, match="no certificate in PEM"):
        load_certificates(signers.folder / "policy.toml") if signers.policy() else None


def test_a_release_whose_gates_were_not_all_run_or_passed_is_not_signed(
    tmp_path: Path, signing_key: SigningKey
) -> None:
    verdicts = [passing("drift"), Verdict(gate="scan", status="fail", reason="one CRITICAL")]
    manifest = make_release(tmp_path / "made", signing_key, verdicts=verdicts)
    (tmp_path / "new").mkdir()
    with pytest.raises(SigningError, match=r"not run: load; not passed: scan \(fail\)"):
        seal(tmp_path / "new", signing_key, manifest)
    assert list((tmp_path / "new").iterdir()) == []


def test_the_provenance_ties_outputs_to_inputs_and_verdicts(release: Path, signing_key: SigningKey) -> None:
    data = (release / "release/provenance.json").read_bytes()
    signer, payload = open_bundle(data, [signing_key.public])
    assert signer == signing_key.public.keyid
    told = json.loads(payload)
    manifest = verify(release, [signing_key.public]).manifest
    assert payload == statement(manifest)
    assert told["predicateType"] == "https://slsa.dev/provenance/v1"
    subjects = {item["name"]: item["digest"]["sha256"] for item in told["subject"]}
    assert subjects["model.safetensors"] == manifest.files["model.safetensors"].sha256
    assert subjects[manifest.image.reference] == manifest.image.digest.removeprefix("sha256:")
    dependencies = {item["name"] for item in told["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert {"source", "calibration", "quantizer's pins", "image's base", "image's pins"} <= dependencies
    gates = {
        item["annotations"]["gate"] for item in told["predicate"]["runDetails"]["byproducts"] if "annotations" in item
    }
    assert gates == {"drift", "scan", "load"}


def _provenance_of_another(folder: Path, key: SigningKey) -> None:
    other = sign_statement(b'{"_type":"https://in-toto.io/Statement/v1"}', key)
    (folder / "release/provenance.json").write_bytes(other)


def _bundle_of_another(folder: Path, key: SigningKey) -> None:
    make_release(folder.parent / "another", key, created="2026-11-24T09:09:09Z")
    (folder / SIGNATURE).write_bytes((folder.parent / "another" / SIGNATURE).read_bytes())


def _bare_statement(folder: Path, key: SigningKey) -> None:
    (folder / SIGNATURE).write_bytes(sign_statement(b'{"_type":"x"}', key))


def _resigned_provenance(folder: Path, key: SigningKey) -> None:
    """The provenance's own envelope, itself signed by a trusted key, in place of the signature over the files."""
    (folder / SIGNATURE).write_bytes((folder / "release/provenance.json").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_provenance_of_another, "release/provenance.json"),
        (lambda folder, _: (folder / "release/provenance.json").unlink(), "release/provenance.json"),
        (_bundle_of_another, SIGNATURE),
        (_bare_statement, SIGNATURE),
        (_resigned_provenance, SIGNATURE),
    ],
)
def test_the_chain_has_no_loose_link(
    release: Path, signing_key: SigningKey, spoil: Callable[[Path, SigningKey], None], named: str
) -> None:
    spoil(release, signing_key)
    with pytest.raises(VerificationError) as caught:
        verify(release, [signing_key.public])
    assert named in {problem.what for problem in caught.value.problems}


@pytest.mark.parametrize(
    "change",
    [
        lambda bundle: bundle.pop("dsseEnvelope"),
        lambda bundle: bundle.update(verificationMaterial=[]),
        lambda bundle: bundle["dsseEnvelope"].update(signatures=[]),
        lambda bundle: bundle["dsseEnvelope"].update(payload="é"),
        lambda bundle: bundle["dsseEnvelope"].update(payloadType="text/plain"),
        lambda bundle: bundle["dsseEnvelope"].update(payload=base64.b64encode(b"{}").decode()),
        lambda bundle: bundle["verificationMaterial"].update(
            publicKey=None, x509CertificateChain={"certificates": [{"rawBytes": "AAAA"}]}
        ),
    ],
)
def test_a_bundle_that_is_none_is_refused(
    release: Path, signing_key: SigningKey, change: Callable[[dict[str, Any]], object]
) -> None:
    bundle = json.loads((release / SIGNATURE).read_bytes())
    change(bundle)
    with pytest.raises(SigningError):
        open_bundle(json.dumps(bundle).encode(), [signing_key.public])


def test_whoever_trusts_no_key_is_told_so(release: Path) -> None:
    with pytest.raises(SigningError, match="no trusted public key was given"):
        open_bundle((release / SIGNATURE).read_bytes(), [])


def test_a_statement_that_contradicts_itself_is_refused(release: Path, signing_key: SigningKey) -> None:
    _, payload = open_bundle((release / SIGNATURE).read_bytes(), [signing_key.public])
    told = json.loads(payload)
    told["predicate"]["resources"].append(told["predicate"]["resources"][0])
    with pytest.raises(SigningError, match="contradicts itself"):
        files_of(json.dumps(told).encode())


def test_a_kind_of_any_length_is_shown_by_its_beginning() -> None:
    envelope = {"payload": "", "payloadType": {"a": "x" * 10_000}, "signatures": [{"sig": ""}]}
    with pytest.raises(SigningError) as caught:
        open_bundle(json.dumps({"dsseEnvelope": envelope, "verificationMaterial": {}}).encode(), [])
    assert len(str(caught.value)) < 200
