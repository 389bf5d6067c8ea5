"""The gateway's configuration: settings, read once at start, and routes, read again when their file changes."""

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


class GatewaySettings(_Section):
    """Settings of a gateway, fixed while it runs. Times are in seconds, sizes in bytes."""

    keys: Path
    """The file of API keys."""
    routes: Path
    """The file of routes."""
    host: str = "127.0.0.1"
    """Where the API listens."""
    port: Port = 8080
    """The API's port; 0 lets the system choose."""
    admin_host: str = "127.0.0.1"
    """The address of the operator's port, with metrics and state."""
    admin_port: Port = 9090
    """The operator's port; 0 lets the system choose."""
    announce: Path | None = None
    """A file to write once both ports are open; it contains their numbers."""
    redis: str | None = None
    """Redis in which several gateways share their limits, `redis://HOST:PORT/NUMBER`. Default: in memory."""
    redis_file: Path | None = None
    """A file that contains the address for `redis`, for an address with a password."""
    engine_key_file: Path | None = None
    """A file that contains the API key of the replicas."""
    max_connections: Count = 4096
    """Connections open at the same time."""
    max_head_bytes: Count = 16 * 1024
    """Size of a request's headers."""
    head_timeout_s: Seconds = 10.0
    """Time in which all headers must arrive."""
    max_body_bytes: Count = 1024 * 1024
    """Size of a request's body."""
    body_timeout_s: Seconds = 20.0
    """Time in which the whole body must arrive."""
    max_answer_bytes: Count = 32 * 1024 * 1024
    """Size of an answer that is not streamed."""
    queue_size: Count = 512
    """Requests that may wait for a free replica."""
    queue_timeout_s: Seconds = 10.0
    """How long a request may wait for a free replica."""
    connect_timeout_s: Seconds = 2.0
    """Time to connect to a replica."""
    request_timeout_s: Seconds = 600.0
    """Time in which a replica must finish its answer."""
    stall_timeout_s: Seconds = 30.0
    """Time in which the next part of an answer must arrive."""
    health_interval_s: Seconds = 1.0
    """Time between two health checks of a replica."""
    health_timeout_s: Seconds = 2.0
    """Time in which a health check must be answered."""
    reload_interval_s: Seconds = 0.25
    """How often to check whether the files of keys and routes have changed."""
    wrong_keys_per_minute: Count = 60
    """Failed authentications allowed from one address."""
    rejected_per_minute: Count = 120
    """Invalid requests allowed for one key, counted by each gateway."""
    bodies_per_key: Count = 16
    """Request bodies of one key that a gateway reads at the same time."""
    drain_delay_s: Annotated[float, Field(ge=0)] = 0.0
    """How long new requests are still accepted after SIGTERM."""
    drain_timeout_s: Seconds = 60.0
    """How long running requests may then take to finish."""


class ReplicaRoute(_Section):
    """One server."""

    name: Label
    """The replica's label in metrics."""
    url: Url
    """Its address."""


class Backend(_Section):
    """A release that answers requests for a model."""

    release: Label
    """Name and version of the release."""
    weight: Annotated[int, Field(ge=0, le=100)] = 100
    """The release's share of the traffic, relative to the other releases of the model."""
    replicas: tuple[ReplicaRoute, ...]
    """Its servers."""


class ModelRoute(_Section):
    """One model of the API."""

    served_as: str
    """The model's name inside the engine."""
    tokenizer: Path
    """The folder of the release's tokenizer."""
    context: Count
    """The model's context length: tokens of prompt and answer together."""
    parallel: Count = 64
    """Requests that one replica works on at the same time."""
    default_tokens: Count = 512
    """Longest answer, in tokens, if the client sets no limit."""
    adapters: tuple[Label, ...] = ()
    """LoRA adapters that all of these releases serve next to the model, by the names that requests use."""
    backends: tuple[Backend, ...]
    """The releases that share the model's traffic."""

    @model_validator(mode="after")
    def _told_apart(self) -> ModelRoute:
        names = [replica.name for backend in self.backends for replica in backend.replicas]
        if len(set(names)) != len(names):
            raise ValueError("two replicas have one name")
        return self


class Routes(_Section):
    """All models of the API."""

    models: Mapping[Label, ModelRoute] = Field(default_factory=dict)
    """The models, by their names in the API."""

    @model_validator(mode="after")
    def _named_apart(self) -> Routes:
        names = [*self.models, *(name for route in self.models.values() for name in route.adapters)]
        if len(set(names)) != len(names):
            raise ValueError("two models or adapters have one name")
        return self


def read_settings(path: Path) -> GatewaySettings:
    """Read the settings file.

    Raises:
        ConfigurationError: The file can't be read, or a key is unknown, missing or not valid.
    """
    return _parse(path, _read(path), TypeAdapter(GatewaySettings).validate_json)[0]


class Watched(Generic[Parsed]):
    """A file that is read again when it changes. If the new content is not valid, the last valid one stays in use.

    ``digest`` is that of the content in use. ``error`` says why the newest content was not accepted, if it was not.
    """

    def __init__(self, path: Path, parse: Callable[[bytes], Parsed]) -> None:
        self.path = path
        self._parse = parse
        self._seen = self._stamp()
        self.value, self.digest = _parse(path, _read(path), parse)
        self.error: str | None = None

    def refresh(self) -> bool:
        """Read the file if it has changed. Return whether new content is in use.

        An unchanged file costs one ``stat``. Writers must replace the file atomically (`os.replace`). A file that can't
        be read is tried again at the next call.
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
    """Return the parsed content and its digest."""
    try:
        return parse(data), f"sha256:{hashlib.sha256(data).hexdigest()}"
    except ValidationError as error:
        # The values are left out, since they may contain a key's hash or a password.
        found = "; ".join(f"`{'.'.join(map(str, item['loc'])) or 'file'}`: {item['msg']}" for item in error.errors())
        raise ConfigurationError(f"{path}: {found}") from error
