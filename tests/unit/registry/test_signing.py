"""Keys are made once and kept close; a signature holds for one document, one kind, one key."""

from __future__ import annotations

import errno
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP256K1,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_public_key,
)

from registry import signing
from registry.errors import SigningError
from registry.signing import (
    PAYLOAD_TYPE,
    Signature,
    SigningKey,
    load_key,
    load_or_create_key,
    load_public_key,
    load_trusted_keys,
    verify_signature,
)

PAYLOAD = b'{"schema":"slipway.release/v1"}'


def test_a_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "release.pem"
    key = load_or_create_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0
    written = path.read_bytes()
    assert load_or_create_key(path).public == key.public
    assert path.read_bytes() == written
    assert load_public_key(tmp_path / "keys" / "release.pub") == key.public
    assert {entry.name for entry in path.parent.iterdir()} == {"release.pem", "release.pub"}


def test_many_at_once_get_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda _: load_or_create_key(tmp_path / "k.pem").public.keyid, range(16)))
    assert len(set(keys)) == 1


def test_a_lost_public_half_is_written_again_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pem"
    key = load_or_create_key(path)
    (tmp_path / "a.pub").unlink()
    load_or_create_key(path)
    assert load_public_key(tmp_path / "a.pub") == key.public
    (tmp_path / "a.pub").write_bytes(load_or_create_key(tmp_path / "b.pem").public.pem())
    with pytest.raises(SigningError, match="not the public half"):
        load_or_create_key(path)


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "k.pem"
    load_or_create_key(path)
    path.chmod(0o640)
    with pytest.raises(SigningError, match=r"0640.*chmod 600"):
        load_or_create_key(path)


@pytest.mark.parametrize(
    ("owner", "user", "mode", "advice"),
    [
        (0, 65534, 0o400, None),
        (0, 65534, 0o440, None),
        *((0, 65534, mode, "chmod 440") for mode in (0o444, 0o644, 0o460, 0o450)),
        (0, 0, 0o440, "chmod 600"),
        (65534, 65534, 0o440, "chmod 600"),
    ],
)
def test_a_key_of_roots_may_be_readable_for_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: int, user: int, mode: int, advice: str | None
) -> None:
    """So Kubernetes mounts a Secret for a pod with `fsGroup` that runs as another user."""
    path = tmp_path / "k.pem"
    public = load_or_create_key(path).public
    found = os.stat_result((stat.S_IFREG | mode, 0, 0, 1, owner, owner, 0, 0, 0, 0))
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", lambda _: found)
        if advice is None:
            assert load_key(path).public == public
            return
        with pytest.raises(SigningError, match=f"{mode:04o}.*{advice}"):
            load_key(path)


def test_a_public_half_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "release.pem"
    load_or_create_key(path)
    (tmp_path / "release.pub").unlink()

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(signing, "create_atomically", refuse)
    with pytest.raises(SigningError, match=r"release\.pub.*Read-only file system.*openssl pkey"):
        load_or_create_key(path)


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_garbage_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "k.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(SigningError, match="PKCS#8"):
        load_or_create_key(path)
    assert path.read_bytes() == content


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "k.pem"
    other = generate_private_key(SECP256K1())
    path.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    with pytest.raises(SigningError, match="P-256, P-384 or P-521, or Ed25519"):
        load_key(path)
    public = tmp_path / "k.pub"
    public.write_bytes(other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(SigningError, match="P-256, P-384 or P-521, or Ed25519"):
        load_public_key(public)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(SigningError, match=r"nowhere\.pem"):
        load_key(tmp_path / "nowhere.pem")
    with pytest.raises(SigningError, match=r"nowhere\.pub"):
        load_trusted_keys([tmp_path / "nowhere.pub"])


def test_trusted_keys_come_from_files_and_folders(tmp_path: Path) -> None:
    first = load_or_create_key(tmp_path / "a.pem").public
    second = load_or_create_key(tmp_path / "b.pem").public
    assert load_trusted_keys([tmp_path]) == (first, second)
    assert load_trusted_keys([tmp_path / "b.pub"]) == (second,)


def test_a_signature_round_trips_and_holds(signing_key: SigningKey) -> None:
    signature = signing_key.sign(PAYLOAD)
    read = Signature.parse(signature.to_bytes())
    assert read == signature
    assert verify_signature(read, PAYLOAD, [signing_key.public]) == signing_key.public.keyid


def test_a_signature_is_dsse_as_others_check_it(signing_key: SigningKey) -> None:
    envelope = json.loads(signing_key.sign(PAYLOAD).to_bytes())
    assert envelope["payloadType"] == PAYLOAD_TYPE
    import base64  # noqa: PLC0415 - what another implementation does, spelt out

    key = load_pem_public_key(signing_key.public.pem())
    assert isinstance(key, EllipticCurvePublicKey)
    encoded = f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(PAYLOAD)} ".encode() + PAYLOAD
    key.verify(base64.b64decode(envelope["signatures"][0]["sig"]), encoded, ECDSA(SHA256()))


def test_other_bytes_other_keys_and_other_kinds_are_refused(signing_key: SigningKey, tmp_path: Path) -> None:
    other = load_or_create_key(tmp_path / "other.pem")
    signature = signing_key.sign(PAYLOAD)
    with pytest.raises(SigningError, match="altered"):
        verify_signature(signature, PAYLOAD + b" ", [signing_key.public])
    with pytest.raises(SigningError, match=f"key {signing_key.public.keyid[:12]}, which is not trusted"):
        verify_signature(signature, PAYLOAD, [other.public])
    with pytest.raises(SigningError, match="no trusted public key"):
        verify_signature(signature, PAYLOAD, [])
    with pytest.raises(SigningError, match="text/plain"):
        verify_signature(signature.model_copy(update={"payload_type": "text/plain"}), PAYLOAD, [signing_key.public])
    claimed = signature.signatures[0].model_copy(update={"sig": other.sign(PAYLOAD).signatures[0].sig})
    with pytest.raises(SigningError, match="altered"):
        verify_signature(signature.model_copy(update={"signatures": (claimed,)}), PAYLOAD, [signing_key.public])


@pytest.mark.parametrize("data", [b"", b"{}", b'{"payloadType":"x","signatures":[]}', b"\xff"])
def test_what_is_no_signature_is_refused(data: bytes) -> None:
    with pytest.raises(SigningError, match="not a signature"):
        Signature.parse(data)


def test_a_signature_that_is_no_base64_is_refused(signing_key: SigningKey) -> None:
    entry = signing_key.sign(PAYLOAD).signatures[0].model_copy(update={"sig": "é!"})
    signature = Signature(payloadType=PAYLOAD_TYPE, signatures=(entry,))
    with pytest.raises(SigningError, match="altered"):
        verify_signature(signature, PAYLOAD, [signing_key.public])


def test_a_key_is_never_shown(signing_key: SigningKey) -> None:
    assert "PRIVATE" not in repr(signing_key)
