"""Statements about an image: what counts, and why what does not count is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from certificates import Signers
from release_folder import passing

from registry.attestation import (
    CYCLONEDX,
    KINDS,
    SIGNED,
    VERDICTS,
    Attachment,
    Scanned,
    Verdicts,
    statement,
    verify_attached,
)
from registry.digests import digest_json
from registry.errors import VerificationError
from registry.policy import Policy
from registry.signing import SigningKey, load_or_create_key
from registry.sigstore_bundle import sign_statement
from registry.verdict import Verdict

DIGEST, OTHER = "sha256:" + "ab" * 32, "sha256:" + "cd" * 32
NOW = datetime(2026, 11, 30, tzinfo=UTC)
BILL = {"bomFormat": "CycloneDX", "components": [{"name": "é"}]}
GATES = tuple(map(passing, ("drift", "scan", "load")))


def verdicts(*gates: Verdict, scanned: str = "2026-11-28T00:00:00Z", passed: bool = True) -> dict[str, Any]:
    return Verdicts.model_construct(
        schema_version="slipway.verdicts/v1", release="demo-awq", manifest_digest=DIGEST, image_digest=DIGEST,
        sealed="2026-11-28T01:00:00Z", passed=passed, gates={gate.gate: gate for gate in gates or GATES},
        scan=Scanned(at=scanned, database_updated_at=None), statements={"sbom": digest_json(BILL)},
    ).predicate()  # fmt: skip


def attached(key: SigningKey, kind: str, predicate: Mapping[str, Any], digest: str = DIGEST) -> Attachment:
    return Attachment(kind, sign_statement(statement(digest, "demo", kind, predicate), key, with_chain=False))


def everything(key: SigningKey, digest: str = DIGEST) -> list[Attachment]:
    of_kind = {CYCLONEDX: BILL, VERDICTS: verdicts(), SIGNED: {}}
    return [attached(key, kind, predicate, digest) for kind, predicate in of_kind.items()]


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    return load_or_create_key(tmp_path / "release.pem")


@pytest.fixture
def stranger(tmp_path: Path) -> SigningKey:
    return load_or_create_key(tmp_path / "stranger.pem")


def refusal(found: list[Attachment], policy: Policy, now: datetime = NOW) -> str:
    with pytest.raises(VerificationError) as caught:
        verify_attached(DIGEST, found, policy, "registry.example/demo", now)
    return "; ".join(map(str, caught.value.problems))


def test_a_signed_image_is_accepted_and_what_others_attached_is_passed_over(
    key: SigningKey, stranger: SigningKey
) -> None:
    junk = [Attachment("", b"no bundle"), *everything(stranger), *everything(key, OTHER)]
    found = verify_attached(DIGEST, [*junk, *everything(key)], Policy((key.public,)), "x", NOW)
    assert (found.signer, found.verdicts.release) == (key.public.keyid, "demo-awq")


def test_the_same_statement_is_signed_with_the_same_bytes(key: SigningKey) -> None:
    assert everything(key) == everything(key)


def test_nothing_attached_is_unsigned(key: SigningKey) -> None:
    why = refusal([], Policy((key.public,)))
    assert why == (
        "signature: none is attached: it was never signed, or was removed; "
        "verdicts: none is attached: it was never signed, or was removed"
    )


@pytest.mark.parametrize("missing", [SIGNED, VERDICTS])
def test_a_removed_statement_is_named(key: SigningKey, missing: str) -> None:
    rest = [each for each in everything(key) if each.announced != missing]
    assert refusal(rest, Policy((key.public,))).startswith(f"{KINDS[missing]}: none is attached")


def test_a_removed_bill_of_materials_is_missed_by_the_verdicts(key: SigningKey) -> None:
    rest = [each for each in everything(key) if each.announced != CYCLONEDX]
    assert refusal(rest, Policy((key.public,))).startswith("sbom: not attached as it was signed")
    changed = [*rest, attached(key, CYCLONEDX, {**BILL, "components": []})]
    assert refusal(changed, Policy((key.public,))).startswith("sbom: not attached as it was signed")


def test_another_images_statements_are_refused_with_its_digest(key: SigningKey) -> None:
    assert f"it is of another image or artifact, {OTHER}" in refusal(everything(key, OTHER), Policy((key.public,)))


def test_an_unknown_a_revoked_and_a_rotated_key(key: SigningKey, stranger: SigningKey) -> None:
    found = everything(stranger)
    assert f"signed by key {stranger.public.keyid[:12]}, which is not trusted" in refusal(found, Policy((key.public,)))
    both = Policy((key.public, stranger.public))
    assert verify_attached(DIGEST, found, both, "x", NOW).signer == stranger.public.keyid
    revoking = Policy((key.public,), revoked=(stranger.public,))
    assert f"signed by key {stranger.public.keyid[:12]}, which is revoked" in refusal(found, revoking)
    assert verify_attached(DIGEST, [*found, *everything(key)], revoking, "x", NOW).signer == key.public.keyid


def test_a_changed_payload_is_refused(key: SigningKey) -> None:
    found = everything(key)
    other = json.loads(found[1].bundle)
    other["dsseEnvelope"]["payload"] = json.loads(attached(key, VERDICTS, {}).bundle)["dsseEnvelope"]["payload"]
    found[1] = Attachment(VERDICTS, json.dumps(other).encode())
    assert "is not over this statement" in refusal(found, Policy((key.public,)))


def test_a_statement_announced_as_another_kind_is_refused(key: SigningKey) -> None:
    found = [replace(each, announced=SIGNED) if each.announced == CYCLONEDX else each for each in everything(key)[:2]]
    assert f"it is announced as `{SIGNED}` and is a `{CYCLONEDX}`" in refusal(found, Policy((key.public,)))


def test_a_gate_that_blocks_and_a_contradiction_are_refused(key: SigningKey) -> None:
    failed = Verdict(gate="scan", status="fail", reason="2 vulnerabilities that count")
    honest = attached(key, VERDICTS, verdicts(GATES[0], failed, GATES[2], passed=False))
    rest = [each for each in everything(key) if each.announced != VERDICTS]
    assert "gate scan: fail: 2 vulnerabilities that count" in refusal([*rest, honest], Policy((key.public,)))
    contradiction = attached(key, VERDICTS, verdicts(GATES[0], failed, GATES[2]))
    assert "`passed` contradicts the verdicts" in refusal([*rest, contradiction], Policy((key.public,)))
    absent = attached(key, VERDICTS, verdicts(GATES[0], GATES[2]))
    assert "gate scan: the release has no verdict of it" in refusal([*rest, absent], Policy((key.public,)))


def test_a_stale_scan_is_refused_until_a_newer_one_is_attached(key: SigningKey) -> None:
    policy = Policy((key.public,), maximum_scan_age=timedelta(days=1))
    why = refusal(everything(key), policy)
    assert why == "scan: expired: 2.0 days old, 1 are allowed; scan anew with `slipway rescan`"
    newer = attached(key, VERDICTS, verdicts(scanned="2026-11-29T12:00:00Z"))
    assert verify_attached(DIGEST, [*everything(key), newer], policy, "x", NOW).verdicts.scan.at[:10] == "2026-11-29"


def test_the_latest_verdicts_count(key: SigningKey) -> None:
    failed = Verdict(gate="scan", status="fail", reason="a new vulnerability")
    newer = attached(key, VERDICTS, verdicts(GATES[0], failed, GATES[2], scanned="2026-11-29T00:00:00Z", passed=False))
    assert "gate scan: fail: a new vulnerability" in refusal([newer, *everything(key)], Policy((key.public,)))


def test_a_certificate_signs_and_an_expired_one_does_not(tmp_path: Path) -> None:
    signers = Signers(tmp_path)
    (tmp_path / "middle.pem").write_bytes(signers.authority)
    policy = signers.policy("release@example.com", trusted="middle.pem")
    found = verify_attached(DIGEST, everything(signers.signer()), policy, "x", NOW)
    assert found.signer == "release@example.com"
    expired = everything(signers.signer(days=(-4, -1)))
    assert "the certificate of release@example.com expired on" in refusal(expired, policy)
    revoked = replace(policy, revoked=(signers.key.public,))
    assert "which is revoked" in refusal(everything(signers.signer()), revoked)
