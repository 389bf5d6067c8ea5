"""Where Slipway keeps its state and what it talks to: the one module that reads the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pipeline.errors import SettingsError

if TYPE_CHECKING:
    from containers.hardware.cpu import Cpu, InstructionSet

CHECKOUT = Path(__file__).resolve().parent.parent

# What a child process needs of the parent's environment; everything else, secrets among it, stays behind.
_PASSED_ON = (
    "PATH", "LANG", "LC_ALL", "TZ", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE",
    "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "NVIDIA_VISIBLE_DEVICES", "SLIPWAY_CPU_ISA",
)  # fmt: skip
# What the installer needs beside: indexes, certificates and caches as the machine sets them.
_INSTALLER_PREFIXES = ("PIP_", "UV_", "XDG_CACHE_HOME", "HOME", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


@dataclass(frozen=True)
class Settings:
    """Everything that the environment decides, read once.

    ``home`` holds all state; ``models`` the models' files; ``docker_host``, ``image_registry`` and
    ``tracking_uri`` are None or the default where the environment is silent. ``signing_certificate`` (PEM, its own
    first) says whose the key is, and ``policy`` is what `registry.policy` reads. ``dagster_postgres`` is the address of
    the database that Dagster keeps its runs in, where that is not SQLite under the home; ``workers`` the file that says
    where workers run, where that is not here (`pipeline.workers.launchers.placement`); ``artifacts`` the object store
    through which homes share what they make (`pipeline.store.shared`). ``child_environment`` is what a worker inherits,
    ``installer_environment`` what the package installer inherits. ``disk_floor`` is how many bytes of the home's disk
    are left free whatever is made. ``locks`` is the folder of the locks that all homes of this machine share
    (`containers.hardware.machine_locks`). ``cpu_limit`` (``SLIPWAY_CPU_ISA``) has this machine's CPU behave as one
    without the
    instruction sets above it, in containers too. Schedules keep the hours of ``timezone``. ``ui_address`` is where
    others find the UI; failures and refusals are told to ``webhook`` (Slack's format) and, through ``mail_server``
    (``smtp[s]://USER:PASSWORD@HOST:PORT``), to ``mail_to``.
    """

    home: Path
    models: Path
    docker_host: str | None
    image_registry: str | None
    tracking_uri: str
    signing_key: Path
    trusted_keys: tuple[Path, ...]
    signing_certificate: Path | None
    policy: Path | None
    trivy_database: str | None
    cold_store: str | None
    artifacts: str | None
    dagster_postgres: str | None = field(repr=False)
    workers: Path | None
    hub_endpoint: str
    hub_token: str | None = field(repr=False)
    child_environment: Mapping[str, str]
    installer_environment: Mapping[str, str] = field(repr=False)
    disk_floor: int
    locks: Path
    cpu_limit: InstructionSet | None
    timezone: str
    ui_address: str
    webhook: str | None = field(repr=False)
    mail_server: str | None = field(repr=False)
    mail_to: tuple[str, ...]

    @property
    def mlflow_address(self) -> str:
        """Where a person finds MLflow: its server, or the one that `slipway ui` starts on the port after its own."""
        if self.tracking_uri.startswith("http"):
            from registry.tracking import shown  # noqa: PLC0415 - the command line starts without the registry

            return shown(self.tracking_uri).rstrip("/")
        place = urlsplit(self.ui_address)
        return place._replace(netloc=f"{place.hostname}:{(place.port or 80) + 1}").geturl()

    @property
    def cpu(self) -> Cpu:
        """This machine's CPU, as it is to behave."""
        from containers.hardware.cpu import this_cpu  # noqa: PLC0415 - the command line starts without it

        return this_cpu(self.cpu_limit)

    @property
    def engine_is_here(self) -> bool:
        """Whether the container engine runs on this machine, as far as its address tells."""
        return self.docker_host is None or self.docker_host.startswith("unix://")

    @property
    def notifies(self) -> bool:
        """Whether anybody is to be told of failures and refusals."""
        return bool(self.webhook or self.mail_to)

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Parse the environment.

        Raises:
            SettingsError: ``SLIPWAY_HOME`` is empty or no folder, or another variable is not what it should be.
        """
        home = _folder(environment.get("SLIPWAY_HOME", str(CHECKOUT / ".slipway")), "SLIPWAY_HOME")
        key = Path(environment.get("SLIPWAY_SIGNING_KEY", home / "keys" / "release.pem")).expanduser().absolute()
        trusted = environment.get("SLIPWAY_TRUSTED_KEYS")
        return cls(
            home=home,
            models=_folder(environment.get("SLIPWAY_MODELS", str(CHECKOUT / "models")), "SLIPWAY_MODELS"),
            docker_host=environment.get("DOCKER_HOST") or None,
            image_registry=environment.get("SLIPWAY_IMAGE_REGISTRY") or None,
            tracking_uri=_tracking_uri(environment) or f"sqlite:///{home}/mlflow/mlflow.db",
            signing_key=key,
            trusted_keys=tuple(Path(item) for item in trusted.split(os.pathsep))
            if trusted
            else (key.with_suffix(".pub"),),
            signing_certificate=_path(environment.get("SLIPWAY_SIGNING_CERTIFICATE")),
            policy=_path(environment.get("SLIPWAY_POLICY")),
            trivy_database=environment.get("SLIPWAY_TRIVY_DATABASE") or None,
            cold_store=environment.get("SLIPWAY_COLD_STORE") or None,
            artifacts=environment.get("SLIPWAY_ARTIFACTS") or None,
            dagster_postgres=_postgres(environment.get("SLIPWAY_DAGSTER_POSTGRES")),
            workers=_path(environment.get("SLIPWAY_WORKERS")),
            hub_endpoint=environment.get("HF_ENDPOINT") or "https://huggingface.co",
            hub_token=_token("HF_TOKEN", environment),
            child_environment={name: environment[name] for name in _PASSED_ON if name in environment},
            installer_environment={
                name: value
                for name, value in environment.items()
                if name in _PASSED_ON or name.upper().startswith(_INSTALLER_PREFIXES)
            },
            disk_floor=_bytes(environment.get("SLIPWAY_DISK_FLOOR"), "SLIPWAY_DISK_FLOOR", default=2 * 2**30),
            locks=_locks(environment.get("SLIPWAY_LOCKS")),
            cpu_limit=_cpu_limit(environment.get("SLIPWAY_CPU_ISA")),
            timezone=_timezone(environment.get("SLIPWAY_TIMEZONE") or "UTC"),
            ui_address=(environment.get("SLIPWAY_UI_ADDRESS") or "http://127.0.0.1:3000").rstrip("/"),
            webhook=environment.get("SLIPWAY_NOTIFY_WEBHOOK") or None,
            mail_server=environment.get("SLIPWAY_NOTIFY_SMTP") or None,
            mail_to=_recipients(environment),
        )


def _bytes(text: str | None, name: str, *, default: int) -> int:
    if not text:
        return default
    from pydantic import ByteSize, TypeAdapter, ValidationError  # noqa: PLC0415 - the command line starts without it

    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise SettingsError(f"`{name}` is {text!r}: expected a size such as 2GiB") from error


def _locks(text: str | None) -> Path:
    from containers.hardware.machine_locks import default_folder  # noqa: PLC0415 - see `_bytes`

    folder = _path(text) or default_folder()
    if not folder.is_dir():
        raise SettingsError(f"`SLIPWAY_LOCKS` is {folder}, which is not a folder: make it, mode 1777 for several users")
    return folder


def _cpu_limit(text: str | None) -> InstructionSet | None:
    if text in {None, ""}:
        return None
    if text != "avx2":
        raise SettingsError(f"`SLIPWAY_CPU_ISA` is {text!r}: expected `avx2`, or nothing for what the CPU has")
    return "avx2"


def _timezone(name: str) -> str:
    if name == "UTC":  # which needs no table of zones: a small image has none
        return name
    try:
        return ZoneInfo(name).key
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise SettingsError(
            f"`SLIPWAY_TIMEZONE` is {name!r}: expected a zone such as Europe/Berlin, of those that `tzdata` has here"
        ) from error


def _recipients(environment: Mapping[str, str]) -> tuple[str, ...]:
    given = environment.get("SLIPWAY_NOTIFY_MAIL", "")
    recipients = tuple(filter(None, (each.strip() for each in given.split(","))))
    server = urlsplit(environment.get("SLIPWAY_NOTIFY_SMTP", ""))
    if recipients and (server.scheme not in {"smtp", "smtps"} or not server.hostname):
        raise SettingsError(
            "`SLIPWAY_NOTIFY_MAIL` needs `SLIPWAY_NOTIFY_SMTP`, as smtps://USER:PASSWORD@HOST:PORT or smtp://HOST:PORT"
        )
    return recipients


def _path(text: str | None) -> Path | None:
    return Path(text).expanduser().absolute() if text else None


def _postgres(text: str | None) -> str | None:
    """Return the address; a refusal does not repeat it, for it may hold a password."""
    if not text:
        return None
    if re.fullmatch(r"postgres(ql)?(\+\w+)?://[^/]+/[^/]+", text) is None:
        raise SettingsError("`SLIPWAY_DAGSTER_POSTGRES` is no postgresql://USER:PASSWORD@HOST:PORT/DATABASE")
    return text


def _token(name: str, environment: Mapping[str, str]) -> str | None:
    from registry.errors import NetworkError  # noqa: PLC0415 - the command line starts without the registry
    from registry.network import token  # noqa: PLC0415

    value = environment.get(name)
    if not value:
        return None
    try:
        return token(name, value) or None
    except NetworkError as error:
        raise SettingsError(str(error)) from error


def _tracking_uri(environment: Mapping[str, str]) -> str | None:
    """Return MLflow's address, with the user and password that MLflow's own variables name, where they do."""
    uri = environment.get("MLFLOW_TRACKING_URI") or None
    if uri is None or "MLFLOW_TRACKING_USERNAME" not in environment:
        return uri
    from registry.tracking import with_credentials  # noqa: PLC0415 - the command line starts without the registry

    return with_credentials(uri, environment)


def _folder(text: str, name: str) -> Path:
    if not text:
        raise SettingsError(f"`{name}` is empty: name a folder, or unset it for the default")
    folder = Path(text).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"`{name}` is {folder}, which is no folder: name another, or remove the file")
    return folder
