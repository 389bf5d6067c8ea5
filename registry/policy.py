"""The trust policy for releases: accepted signatures, required gates, and maximum age.

A policy can be kept beside a deployment as a TOML file; paths in it count from its folder:

    [signers]
    keys = ["keys/release.pub"]          # PEM files, or folders whose *.pub files are taken
    certificates = ["keys/ca.pem"]       # authorities, whose certificates may sign …
    identities = ["release@example.com"] # … for these names; every name where this is left out
    revoked = ["keys/former.pub"]        # signatures of these keys never count, whatever else is trusted
    signed_moves = true                  # aliases count only as entries of the audit trail say that `keys` signed

    [gates]
    required = ["drift", "scan", "load"]

    [evidence]
    maximum_age_days = 90
    maximum_scan_age_days = 7            # of what is attached to an image (`registry.attestation`)

The age counts from ``created`` in the manifest, which is when the release was sealed: the manifest holds no date of a
measurement. Evidence that was taken over from an earlier run is older than that. A release that was sealed more than
an hour from now, by this machine's clock, is refused where an age is asked for: one of the two clocks is wrong.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from registry.certificates import Authority
from registry.errors import Problem, TrustPolicyError
from registry.manifest import REQUIRED_GATES, Manifest
from registry.signing import PublicKey, load_certificates, load_trusted_keys
from registry.verdict import Verdict

_KEYS: Mapping[str, frozenset[str]] = {
    "signers": frozenset({"keys", "certificates", "identities", "revoked", "signed_moves"}),
    "gates": frozenset({"required"}),
    "evidence": frozenset({"maximum_age_days", "maximum_scan_age_days"}),
}

# How far the clock of whoever sealed a release may be ahead of the one that its age is judged by.
_CLOCKS_APART = timedelta(hours=1)


@dataclass(frozen=True)
class Policy:
    """Trusted keys and authorities, gates that must be there, and the greatest age since sealing; None is any age.

    ``revoked`` are keys whose signatures do not count; none of them is among ``keys``. ``maximum_scan_age`` is that of
    the scan that a statement attached to an image names.
    """

    keys: tuple[PublicKey, ...]
    required_gates: tuple[str, ...] = REQUIRED_GATES
    maximum_age: timedelta | None = None
    signed_moves: bool = False
    authorities: tuple[Authority, ...] = ()
    revoked: tuple[PublicKey, ...] = ()
    maximum_scan_age: timedelta | None = None

    @classmethod
    def load(cls, path: Path) -> Policy:
        """Read a policy from a TOML file.

        Raises:
            PolicyError: The file can't be read, or has a key that means nothing.
            SigningError: A key can't be read.
        """
        try:
            document = tomllib.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise TrustPolicyError(f"the policy `{path}` can't be read: {error}") from error
        _refuse_unknown(path, document)
        signers = document.get("signers", {})
        revoked = load_trusted_keys([path.parent / item for item in _strings(path, signers, "revoked", "signers")])
        signed_moves = signers.get("signed_moves", False)
        if not isinstance(signed_moves, bool):
            raise TrustPolicyError(f"`signers.signed_moves` in `{path}` is {signed_moves!r}: give true or false")
        listed = load_trusted_keys([path.parent / item for item in _strings(path, signers, "keys", "signers")])
        keys = tuple(key for key in listed if key not in revoked)
        if signed_moves and not keys:
            raise TrustPolicyError(
                f"`signers.signed_moves` in `{path}` needs `signers.keys`: an entry of the audit trail is signed by a"
                " key, never by a certificate"
            )
        return cls(
            keys=keys,
            required_gates=tuple(
                _strings(path, document.get("gates", {}), "required", "gates", default=list(REQUIRED_GATES))
            ),
            maximum_age=_days(path, document, "maximum_age_days"),
            signed_moves=signed_moves,
            authorities=tuple(
                Authority(certificate, tuple(_strings(path, signers, "identities", "signers")))
                for item in _strings(path, signers, "certificates", "signers")
                for certificate in load_certificates(path.parent / item)
            ),
            revoked=revoked,
            maximum_scan_age=_days(path, document, "maximum_scan_age_days"),
        )

    def judge(self, manifest: Manifest, now: datetime | None = None) -> list[Problem]:
        """Name each gate that blocks or is absent, and evidence that is too old."""
        return self.judge_gates([record.verdict for record in manifest.gates], manifest.created, now)

    def judge_gates(self, verdicts: Sequence[Verdict], sealed: str, now: datetime | None = None) -> list[Problem]:
        """Judge verdicts, and the time at which their release was sealed, as `judge` does."""
        present = {verdict.gate for verdict in verdicts}
        problems = [
            Problem(f"gate {name}", "the release has no verdict of it")
            for name in self.required_gates
            if name not in present
        ]
        problems += [
            Problem(f"gate {verdict.gate}", f"{verdict.status}: {verdict.reason}")
            for verdict in verdicts
            if verdict.blocks
        ]
        return problems + _too_old("evidence", "sealed", sealed, self.maximum_age, "measure and release anew", now)

    def judge_scan(self, scanned: str, now: datetime | None = None) -> list[Problem]:
        """Say so where a scan at this time is too old."""
        return _too_old("scan", "scanned", scanned, self.maximum_scan_age, "scan anew with `slipway rescan`", now)


Trust = Sequence[PublicKey] | Policy


def policy_of(trust: Trust, required_gates: Sequence[str] | None = None) -> Policy:
    """Return the policy, or that which trusts these keys; ``required_gates``, if given, in place of its own."""
    policy = trust if isinstance(trust, Policy) else Policy(tuple(trust))
    if required_gates is None:
        return policy
    return replace(policy, required_gates=tuple(required_gates))


def _refuse_unknown(path: Path, document: Mapping[str, Any]) -> None:
    for section, content in document.items():
        if section not in _KEYS or not isinstance(content, dict):
            raise TrustPolicyError(f"`{section}` in `{path}` means nothing: there is {', '.join(sorted(_KEYS))}")
        for key in content.keys() - _KEYS[section]:
            known = ", ".join(sorted(_KEYS[section]))
            raise TrustPolicyError(f"`{section}.{key}` in `{path}` means nothing: there is {known}")


def _too_old(
    what: str, done: str, moment: str, maximum: timedelta | None, remedy: str, now: datetime | None
) -> list[Problem]:
    if maximum is None:
        return []
    age, day = (now or datetime.now(UTC)) - datetime.fromisoformat(moment), timedelta(days=1)
    if age < -_CLOCKS_APART:
        ahead = f"{-age / day:.1f} days ahead of this machine's clock"
        return [Problem(what, f"{done} {ahead}, so that its age is unknown: set the clock")]
    if age > maximum:
        return [Problem(what, f"expired: {age / day:.1f} days old, {maximum / day:g} are allowed; {remedy}")]
    return []


def _days(path: Path, document: Mapping[str, Any], key: str) -> timedelta | None:
    days = document.get("evidence", {}).get(key)
    if days is None:
        return None
    if not isinstance(days, (int, float)) or days <= 0:
        raise TrustPolicyError(f"`evidence.{key}` in `{path}` is {days!r}: give a number of days above zero")
    return timedelta(days=days)


def _strings(
    path: Path, section: Mapping[str, Any], key: str, where: str, default: Sequence[str] = ()
) -> Sequence[str]:
    found = section.get(key, default)
    if not isinstance(found, (list, tuple)) or not all(isinstance(item, str) for item in found):
        raise TrustPolicyError(f"`{where}.{key}` in `{path}` is not a list of strings")
    return found
