"""What the gateway is told: settings that hold while it runs, and routes that may change under it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from containers.gateway.errors import ConfigurationError

Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]*$", max_length=160)]
Url = Annotated[str, StringConstraints(pattern=r"^https?://[^/?#\s]+$")]
Port = Annotated[int, Field(ge=0, le=65535)]
Parsed = TypeVar("Parsed")

log = logging.getLogger("slipway.gateway")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Settings(_Section):
    """What holds from start to end; seconds and bytes."""

    keys: Path
    """The file of API keys."""
    routes: Path
    """The file of routes."""
    host: str = "127.0.0.1"
    """Where the API listens."""
    port: Port = 8080
    """The API's port; 0 lets the system choose."""
    admin_host: str = "127.0.0.1"
    """Where metrics and state are."""
    admin_port: Port = 9090
    """Their port; 0 lets the system choose."""
    announce: Path | None = None
    """A file that is written once both ports are open."""
    redis: str | None = None
    """Shares the limits among gateways, `redis://HOST:PORT/NUMBER`; in memory where it is left out."""
    redis_file: Path | None = None
    """A file that holds that address, where it has a password."""
    engine_key_file: Path | None = None
    """The file of the key that replicas ask for."""
    max_connections: Count = 4096
    """Open at once."""
    max_head_bytes: Count = 16 * 1024
    """Of a request's head."""
    head_timeout_s: Seconds = 10.0
    """For a whole head."""
    max_body_bytes: Count = 1024 * 1024
    """Of a request's body."""
    body_timeout_s: Seconds = 20.0
    """For a whole body."""
    max_answer_bytes: Count = 32 * 1024 * 1024
    """Of an answer that is not a stream."""
    queue_size: Count = 512
    """Requests that wait for a place."""
    queue_timeout_s: Seconds = 10.0
    """How long one waits."""
    connect_timeout_s: Seconds = 2.0
    """To a replica."""
    request_timeout_s: Seconds = 600.0
    """For a whole answer."""
    stall_timeout_s: Seconds = 30.0
    """For the next piece of an answer."""
    health_interval_s: Seconds = 1.0
    """Between looks at a replica."""
    health_timeout_s: Seconds = 2.0
    """For its answer."""
    reload_interval_s: Seconds = 0.25
    """Between looks at the files of keys and routes."""
    wrong_keys_per_minute: Count = 60
    """Of one address."""
    rejected_per_minute: Count = 120
    """Wrong requests of one key, at each gateway."""
    bodies_per_key: Count = 16
    """Requests of one key that are read at a time, at each gateway."""
    drain_delay_s: Annotated[float, Field(ge=0)] = 0.0
    """How long requests are still taken after SIGTERM."""
    drain_timeout_s: Seconds = 60.0
    """How long what has begun may take then."""


class ReplicaRoute(_Section):
    """One server."""

    name: Label
    """Its label in metrics."""
    url: Url
    """Its address."""


class Backend(_Section):
    """One release that answers for a model."""

    release: Label
    """Its name and version."""
    weight: Annotated[int, Field(ge=0, le=100)] = 100
    """Its share of the traffic; a canary has the smaller one."""
    replicas: tuple[ReplicaRoute, ...]
    """Its servers."""


class ModelRoute(_Section):
    """One model of the API."""

    served_as: str
    """Its name inside the engine."""
    tokenizer: Path
    """The folder of the release's tokenizer."""
    context: Count
    """Tokens of prompt and answer together."""
    parallel: Count = 64
    """Requests at one replica at a time."""
    default_tokens: Count = 512
    """The longest answer where the client does not say."""
    backends: tuple[Backend, ...]
    """The releases that answer."""

    @model_validator(mode="after")
    def _told_apart(self) -> ModelRoute:
        names = [replica.name for backend in self.backends for replica in backend.replicas]
        if len(set(names)) != len(names):
            raise ValueError("two replicas have one name")
        return self


class Routes(_Section):
    """Every model of the API."""

    models: Mapping[Label, ModelRoute] = Field(default_factory=dict)
    """By its name in the API."""


def read_settings(path: Path) -> Settings:
    """Read the settings file.

    Raises:
        ConfigurationError: It can't be read, or a key is unknown, missing or wrong.
    """
    return _parse(path, _read(path), TypeAdapter(Settings).validate_json)[0]


class Watched(Generic[Parsed]):
    """A file that is read again when it changes; what can't be used leaves the last good content in place.

    ``digest`` tells the content in use from another; ``error`` says what is wrong with the newest one, if anything.
    """

    def __init__(self, path: Path, parse: Callable[[bytes], Parsed]) -> None:
        self.path = path
        self._parse = parse
        self._seen = self._stamp()
        self.value, self.digest = _parse(path, _read(path), parse)
        self.error: str | None = None

    def refresh(self) -> bool:
        """Look at the file; return whether there is new content in use.

        Cheap where nothing changed: one ``stat``. The file is to be replaced whole (`os.replace`). One that
        can't be read is tried again at the next look.
        """
        stamp = self._stamp()
        if stamp == self._seen:
            return False
        try:
            self._seen = None
            data = _read(self.path)
            self._seen = stamp
            self.value, self.digest = _parse(self.path, data, self._parse)
        except ConfigurationError as error:
            if self.error != str(error):
                self.error = str(error)
                log.warning("kept what was in use: %s", error)
            return False
        self.error = None
        return True

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"can't read {path}: {error.strerror}") from error


def _parse(path: Path, data: bytes, parse: Callable[[bytes], Parsed]) -> tuple[Parsed, str]:
    """The content and its digest."""
    try:
        return parse(data), f"sha256:{hashlib.sha256(data).hexdigest()}"
    except ValidationError as error:
        # Without the values: a key's hash or a password has no place in a message.
        found = "; ".join(f"`{'.'.join(map(str, item['loc'])) or 'file'}`: {item['msg']}" for item in error.errors())
        raise ConfigurationError(f"{path}: {found}") from error
