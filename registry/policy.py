"""The trust policy for releases: accepted signatures, required gates, and maximum age.

A policy can be kept beside a deployment as a TOML file; paths in it count from its folder:

    [signers]
    keys = ["keys/release.pub"]          # PEM files, or folders whose *.pub files are taken
    certificates = ["keys/ca.pem"]       # authorities, whose certificates may sign …
    identities = ["release@example.com"] # … for these names; every name where this is left out
    signed_moves = true                  # aliases count only as entries of the audit trail say that `keys` signed

    [gates]
    required = ["drift", "scan", "load"]

    [evidence]
    maximum_age_days = 90

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

_KEYS: Mapping[str, frozenset[str]] = {
    "signers": frozenset({"keys", "certificates", "identities", "signed_moves"}),
    "gates": frozenset({"required"}),
    "evidence": frozenset({"maximum_age_days"}),
}

# How far the clock of whoever sealed a release may be ahead of the one that its age is judged by.
_CLOCKS_APART = timedelta(hours=1)


@dataclass(frozen=True)
class Policy:
    """Trusted keys and authorities, gates that must be there, and the greatest age since sealing; None is any age."""

    keys: tuple[PublicKey, ...]
    required_gates: tuple[str, ...] = REQUIRED_GATES
    maximum_age: timedelta | None = None
    signed_moves: bool = False
    authorities: tuple[Authority, ...] = ()

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
        days = document.get("evidence", {}).get("maximum_age_days")
        if days is not None and (not isinstance(days, (int, float)) or days <= 0):
            raise TrustPolicyError(
                f"`evidence.maximum_age_days` in `{path}` is {days!r}: give a number of days above zero"
            )
        signed_moves = signers.get("signed_moves", False)
        if not isinstance(signed_moves, bool):
            raise TrustPolicyError(f"`signers.signed_moves` in `{path}` is {signed_moves!r}: give true or false")
        keys = load_trusted_keys([path.parent / item for item in _strings(path, signers, "keys", "signers")])
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
            maximum_age=None if days is None else timedelta(days=days),
            signed_moves=signed_moves,
            authorities=tuple(
                Authority(certificate, tuple(_strings(path, signers, "identities", "signers")))
                for item in _strings(path, signers, "certificates", "signers")
                for certificate in load_certificates(path.parent / item)
            ),
        )

    def judge(self, manifest: Manifest, now: datetime | None = None) -> list[Problem]:
        """Name each gate that blocks or is absent, and evidence that is too old."""
        verdicts = {record.verdict.gate: record.verdict for record in manifest.gates}
        problems = [
            Problem(f"gate {name}", "the release has no verdict of it")
            for name in self.required_gates
            if name not in verdicts
        ]
        problems += [
            Problem(f"gate {name}", f"{verdict.status}: {verdict.reason}")
            for name, verdict in verdicts.items()
            if verdict.blocks
        ]
        if self.maximum_age is not None:
            age = (now or datetime.now(UTC)) - datetime.fromisoformat(manifest.created)
            if age < -_CLOCKS_APART:
                ahead = f"{-age / timedelta(days=1):.1f} days ahead of this machine's clock"
                problems.append(Problem("evidence", f"sealed {ahead}, so that its age is unknown: set the clock"))
            if age > self.maximum_age:
                days = f"{age / timedelta(days=1):.1f} days old, {self.maximum_age / timedelta(days=1):g} are allowed"
                problems.append(Problem("evidence", f"expired: {days}; measure and release anew"))
        return problems


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


def _strings(
    path: Path, section: Mapping[str, Any], key: str, where: str, default: Sequence[str] = ()
) -> Sequence[str]:
    found = section.get(key, default)
    if not isinstance(found, (list, tuple)) or not all(isinstance(item, str) for item in found):
        raise TrustPolicyError(f"`{where}.{key}` in `{path}` is not a list of strings")
    return found
