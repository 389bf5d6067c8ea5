"""API keys: creation, storage as hashes, lookup in constant time.

A key has the form ``slw-ID-SECRET``. ID is public (logs, metrics) and identifies the entry. SECRET is 256 random bits,
of which only the SHA-256 is stored. A slow hash is needed for passwords, not for 256 random bits.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from containers.gateway.errors import ConfigurationError, Refusal

PREFIX = "slw"
_FORM = re.compile(rf"{PREFIX}-([0-9a-f]{{12}})-([A-Za-z0-9_-]{{43}})", re.ASCII)

Limit = Annotated[int, Field(ge=1)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class Limits(BaseModel):
    """Limits of a key; None is no limit. ``parallel`` is the number of concurrent requests at each gateway."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    parallel: Limit | None = None


class Key(BaseModel):
    """An API key as it is stored. Empty ``models`` allows every model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12}$")]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    owner: Name
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None
    models: tuple[Name, ...] = ()
    limits: Limits = Limits()

    def state(self, now: datetime) -> str:
        """``active``, ``expired`` or ``revoked``."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "active"

    def may_use(self, model: str) -> bool:
        """Whether the key may use this model."""
        return not self.models or model in self.models


_FILE: TypeAdapter[tuple[Key, ...]] = TypeAdapter(tuple[Key, ...])
_NOBODY = hashlib.sha256(b"").hexdigest()


class Keyring:
    """All keys, by id."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self._keys = {key.id: key for key in keys}

    @classmethod
    def parse(cls, data: bytes) -> Keyring:
        """Parse the file's content. Raises ``ValidationError``."""
        return cls(_FILE.validate_json(data))

    def authenticate(self, header: str | None, now: datetime) -> Key:
        """Return the key given in an ``Authorization`` header.

        An unknown id takes as long as a wrong secret, because both are hashed and compared.

        Raises:
            Refusal: 401, with the same message for an unknown, a wrong and a revoked key.
        """
        scheme, _, token = (header or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Refusal(401, "missing_api_key", "send your API key as `Authorization: Bearer KEY`")
        match = _FORM.fullmatch(token.strip())
        found = self._keys.get(match[1]) if match else None
        offered = hashlib.sha256((match[2] if match else "").encode()).hexdigest()
        same = hmac.compare_digest(offered, found.sha256 if found else _NOBODY)
        if found is None or not same or found.revoked is not None:
            raise Refusal(401, "invalid_api_key", "this API key is not valid")
        if found.state(now) == "expired":
            raise Refusal(401, "expired_api_key", "this API key has expired")
        return found


def add(
    path: Path,
    owner: str,
    *,
    models: Sequence[str] = (),
    expires: datetime | None = None,
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> tuple[Key, str]:
    """Make a key and store its hash in the file. Return the entry and the key itself, which is not stored.

    Raises:
        ConfigurationError: The file can't be read or written, or the owner's name is not valid.
    """
    secret = secrets.token_urlsafe(32)
    with _changing(path) as (keys, write):
        try:
            key = Key(
                id=secrets.token_hex(6),
                sha256=hashlib.sha256(secret.encode()).hexdigest(),
                owner=owner,
                created=datetime.now(UTC).replace(microsecond=0),
                expires=expires,
                models=tuple(models),
                limits=limits,
            )
        except ValidationError as error:
            raise ConfigurationError(f"`{error.errors()[0]['loc'][0]}`: {error.errors()[0]['msg']}") from error
        write([*keys, key])
    return key, f"{PREFIX}-{key.id}-{secret}"


def revoke(path: Path, key_id: str) -> Key:
    """Revoke a key. The gateway refuses it within a second.

    Raises:
        ConfigurationError: The key is unknown.
    """
    with _changing(path) as (keys, write):
        found = [key for key in keys if key.id == key_id]
        if not found:
            raise ConfigurationError(f"there is no key `{key_id}`: `slipway keys list` shows all keys")
        revoked = found[0].model_copy(update={"revoked": datetime.now(UTC).replace(microsecond=0)})
        write([revoked if key.id == key_id else key for key in keys])
    return revoked


def read(path: Path) -> tuple[Key, ...]:
    """Return all keys of the file; none if the file is missing.

    Raises:
        ConfigurationError: The file is not a list of API keys.
    """
    try:
        return _FILE.validate_json(path.read_bytes())
    except FileNotFoundError:
        return ()
    except (OSError, ValidationError) as error:
        raise ConfigurationError(f"{path} is not a list of API keys ({type(error).__name__})") from error


def create(path: Path) -> None:
    """Make an empty file if it is missing."""
    with _changing(path) as (keys, write):
        if not path.exists():
            write(list(keys))


@contextmanager
def _changing(path: Path) -> Iterator[tuple[tuple[Key, ...], Callable[[Sequence[Key]], None]]]:
    """Lock the file; yield its keys and a function that replaces them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield read(path), lambda keys: _write(path, keys)


def _write(path: Path, keys: Sequence[Key]) -> None:
    """Replace the file, which only its owner can read."""
    text = json.dumps([key.model_dump(mode="json") for key in keys], indent=1)
    descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    Path(beside).replace(path)
