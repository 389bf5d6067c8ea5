"""What a policy asks for, and what is no policy."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from registry import verify
from registry.errors import TrustPolicyError, VerificationError
from registry.policy import Policy
from registry.signing import SigningKey


def policy(folder: Path, key: SigningKey, text: str) -> Policy:
    (folder / "release.pub").write_bytes(key.public.pem())
    (folder / "policy.toml").write_text(text)
    return Policy.load(folder / "policy.toml")


def test_what_a_policy_says_is_read(tmp_path: Path, signing_key: SigningKey) -> None:
    text = (
        '[signers]\nkeys = ["release.pub"]\nsigned_moves = true\n'
        '[gates]\nrequired = ["scan"]\n[evidence]\nmaximum_age_days = 1.5\n'
        "maximum_scan_age_days = 2\n"
    )
    found = policy(tmp_path, signing_key, text)
    assert found == Policy(
        (signing_key.public,), ("scan",), timedelta(hours=36), signed_moves=True, maximum_scan_age=timedelta(days=2)
    )


def test_a_revoked_key_is_not_trusted_whatever_folder_it_is_in(
    tmp_path: Path, signing_key: SigningKey, release: Path
) -> None:
    text = '[signers]\nkeys = ["release.pub"]\nrevoked = ["release.pub"]\n'
    found = policy(tmp_path, signing_key, text)
    assert (found.keys, found.revoked) == ((), (signing_key.public,))
    with pytest.raises(VerificationError, match=f"signed by key {signing_key.public.keyid[:12]}, which is revoked"):
        verify(release, found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[signers]\nsigned_moves = true\n", r"`signers\.signed_moves` in .* needs `signers\.keys`"),
        ('[signers]\nkeys = ["release.pub"]\nsigned_moves = "yes"\n', "is 'yes': give true or false"),
        ("[evidence]\nmaximum_age_days = 0\n", "give a number of days above zero"),
        ("[evidence]\nmaximum_age = 9\n", "means nothing"),
        ("[signers\n", "can't be read"),
    ],
)
def test_what_is_no_policy_is_refused(tmp_path: Path, signing_key: SigningKey, text: str, message: str) -> None:
    with pytest.raises(TrustPolicyError, match=message):
        policy(tmp_path, signing_key, text)


def test_evidence_expires_when_the_days_since_sealing_are_over(release: Path, signing_key: SigningKey) -> None:
    manifest = verify(release, [signing_key.public]).manifest
    limited = Policy((signing_key.public,), maximum_age=timedelta(days=90))
    sealed = datetime.fromisoformat(manifest.created)
    assert sealed.tzinfo == UTC
    assert limited.judge(manifest, sealed + timedelta(days=90)) == []
    (problem,) = limited.judge(manifest, sealed + timedelta(days=90, seconds=1))
    assert problem.what == "evidence"
    assert "90.0 days old, 90 are allowed" in problem.why


def test_an_age_is_not_judged_by_a_clock_that_is_behind(release: Path, signing_key: SigningKey) -> None:
    manifest = verify(release, [signing_key.public]).manifest
    limited = Policy((signing_key.public,), maximum_age=timedelta(days=90))
    sealed = datetime.fromisoformat(manifest.created)
    assert limited.judge(manifest, sealed - timedelta(hours=1)) == []
    (problem,) = limited.judge(manifest, sealed - timedelta(days=400))
    assert "400.0 days ahead of this machine's clock" in problem.why
    assert Policy((signing_key.public,)).judge(manifest, sealed - timedelta(days=400)) == []
