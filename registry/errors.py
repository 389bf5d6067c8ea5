"""Errors of signing, registering, promoting and pulling releases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class RegistryError(Exception):
    """Any failure of this package; its message is one line and says what to do next."""


class ManifestError(RegistryError):
    """A manifest that can't be read: not canonical, of another version, a key unknown or missing."""


class SigningError(RegistryError):
    """A key that can't be read or made."""


class TrackingError(RegistryError):
    """MLflow can't be reached, or refused what was asked of it."""


class NetworkSettingError(TrackingError):
    """A network setting that can't be used: a proxy, a certificate file, a token."""


class RefusedError(TrackingError):
    """MLflow or a store asks for credentials, denies permission, or has no such file; trying again does not help."""


class PromotionError(RegistryError):
    """A release that could not be promoted; no alias moved."""


class PullError(RegistryError):
    """A release that can't be found or fetched; the destination is unchanged."""


class NotFoundError(PullError):
    """No such release line, alias or version."""


class ArgumentError(PullError):
    """A reference or destination that can't be used; trying again does not help."""


class VariantError(PullError):
    """The release does not list the serving variant that is asked for, so it did not pass its gates."""


class DiskError(PullError):
    """The destination or the cache can't be written now: no space, or no permission."""


class FileSystemError(RegistryError):
    """A file system lacks a feature that is needed; trying again does not help."""


class UntrustedFileError(RegistryError):
    """A file from a worker, a source or an interrupted pull that is not a regular file, or is too large."""


class TrustPolicyError(RegistryError):
    """A trust policy that can't be read."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a release folder: ``what`` is a file's name, ``release`` or ``gate NAME``."""

    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


class VerificationError(RegistryError):
    """A folder that differs from what was signed. ``problems`` lists every difference."""

    def __init__(self, folder: object, problems: Sequence[Problem]) -> None:
        self.folder = str(folder)
        self.problems = tuple(problems)
        shown = "; ".join(str(problem) for problem in self.problems[:3])
        more = f"; and {len(self.problems) - 3} more" if len(self.problems) > 3 else ""
        super().__init__(f"`{folder}` is not the release that was signed: {shown}{more}")


def first_problem(error: ValidationError) -> str:
    """The first problem of a document that does not have the expected form: "`KEY.PATH`: why", without its values."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"])) or "the document"
    return f"`{place[:200]}`: {first['msg'][:200]}"
