"""What admission controllers check of a release's image: the keys that may sign it, and how old its scan may be."""

from __future__ import annotations

from dataclasses import dataclass

from containers.image.distribution import parse
from registry.attestation import VERDICTS
from registry.policy import REQUIRED_GATES

_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")


@dataclass(frozen=True)
class Admission:
    """The policies' conditions: public keys as PEM, any of which may have signed, and the greatest age of the scan."""

    keys: tuple[str, ...]
    scan_age_days: int
    required_gates: tuple[str, ...] = REQUIRED_GATES

    @property
    def scan_age_hours(self) -> int:
        """The age as admission controllers take it; they know no unit above hours."""
        return 24 * self.scan_age_days

    @property
    def attestors(self) -> str:
        """The keys as Kyverno's expressions name them."""
        return f"[{', '.join(f'attestors.key{number}' for number, _ in enumerate(self.keys, start=1))}]"

    @property
    def predicate(self) -> str:
        """The type of the statement with the verdicts."""
        return VERDICTS


def spellings(repository: str) -> list[str]:
    """Return the names by which pods can use a repository: Docker Hub has several, and is meant where none is named."""
    host, name, _ = parse(repository)
    return [*(f"{each}/{name}" for each in _HUB), name] if host in _HUB else [repository]
