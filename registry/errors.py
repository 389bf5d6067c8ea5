"""What can go wrong between a signed release and the folder that a deployment loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class RegistryError(Exception):
    """Any failure of this package; its message is one line that says what to do next."""


class ManifestError(RegistryError):
    """A manifest that can't be read: not canonical, of another version, a key unknown or missing."""


class SigningError(RegistryError):
    """A key that can't be read or made."""


class TrackingError(RegistryError):
    """MLflow can't be reached, or refused what was asked of it."""


class NetworkSettingError(TrackingError):
    """A setting of the network that can't be used: a proxy, a file of certificates, a token."""


class RefusedError(TrackingError):
    """MLflow asks who one is, or does not permit it; trying again changes nothing."""


class PromotionError(RegistryError):
    """A release that may not be promoted, or could not be; no alias was moved."""


class PullError(RegistryError):
    """A release that can't be found or fetched; the destination is as it was."""


class NotFoundError(PullError):
    """No such release line, alias or version."""


class ArgumentError(PullError):
    """The reference or the destination can't be used as it was given; trying again changes nothing."""


class DiskError(PullError):
    """The destination or the cache can't be written now: no space, or no permission."""


class FileSystemError(RegistryError):
    """A file system lacks what the work there needs; trying again changes nothing."""


class UntrustedFileError(RegistryError):
    """Something else than a regular file, or a larger one, where a worker, a source or a pull should have left one."""


class TrustPolicyError(RegistryError):
    """A policy that can't be read."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a release folder: ``what`` is a file's name, ``release`` or ``gate NAME``."""

    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


class VerificationError(RegistryError):
    """A folder that is not what was signed. ``problems`` names everything that is wrong, not the first thing found."""

    def __init__(self, folder: object, problems: Sequence[Problem]) -> None:
        self.folder = str(folder)
        self.problems = tuple(problems)
        shown = "; ".join(str(problem) for problem in self.problems[:3])
        more = f"; and {len(self.problems) - 3} more" if len(self.problems) > 3 else ""
        super().__init__(f"`{folder}` is not the release that was signed: {shown}{more}")
