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
    """What holds from start to end. Ports of 0 are chosen by the system; ``announce`` is written once both are open.

    ``redis`` (or the file ``redis_file`` that holds it, where it has a password) shares the limits among gateways;
    without it they are in memory. ``rejected_per_minute`` is how many requests of a key may be wrong,
    ``bodies_per_key`` how many of its requests may be read at a time, both at each gateway. ``engine_key_file`` holds
    the key that replicas ask for. Seconds and bytes.
    """

    keys: Path
    routes: Path
    host: str = "127.0.0.1"
    port: Port = 8080
    admin_host: str = "127.0.0.1"
    admin_port: Port = 9090
    announce: Path | None = None
    redis: str | None = None
    redis_file: Path | None = None
    engine_key_file: Path | None = None
    max_connections: Count = 4096
    max_head_bytes: Count = 16 * 1024
    head_timeout_s: Seconds = 10.0
    max_body_bytes: Count = 1024 * 1024
    body_timeout_s: Seconds = 20.0
    max_answer_bytes: Count = 32 * 1024 * 1024
    queue_size: Count = 512
    queue_timeout_s: Seconds = 10.0
    connect_timeout_s: Seconds = 2.0
    request_timeout_s: Seconds = 600.0
    stall_timeout_s: Seconds = 30.0
    health_interval_s: Seconds = 1.0
    health_timeout_s: Seconds = 2.0
    reload_interval_s: Seconds = 0.25
    wrong_keys_per_minute: Count = 60
    rejected_per_minute: Count = 120
    bodies_per_key: Count = 16
    drain_delay_s: Annotated[float, Field(ge=0)] = 0.0
    drain_timeout_s: Seconds = 60.0


class ReplicaRoute(_Section):
    """One server: ``name`` is its label in metrics."""

    name: Label
    url: Url


class Backend(_Section):
    """One release that answers for a model, with its share of the traffic (a canary has the smaller one)."""

    release: Label
    weight: Annotated[int, Field(ge=0, le=100)] = 100
    replicas: tuple[ReplicaRoute, ...]


class ModelRoute(_Section):
    """One model of the API.

    ``served_as`` is its name inside the engine, ``tokenizer`` the folder of the release's tokenizer. A replica has at
    most ``parallel`` requests at a time; an answer is ``default_tokens`` long at most where the client does not say.
    """

    served_as: str
    tokenizer: Path
    context: Count
    parallel: Count = 64
    default_tokens: Count = 512
    chat: bool = True
    backends: tuple[Backend, ...]

    @model_validator(mode="after")
    def _told_apart(self) -> ModelRoute:
        names = [replica.name for backend in self.backends for replica in backend.replicas]
        if len(set(names)) != len(names):
            raise ValueError("two replicas have one name")
        return self


class Routes(_Section):
    """Every model by its name in the API."""

    models: Mapping[Label, ModelRoute] = Field(default_factory=dict)


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
