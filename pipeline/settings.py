"""Settings from the environment, which only this module reads: folders, servers, credentials and limits."""

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
from pipeline.resources import CHECKOUT

if TYPE_CHECKING:
    from containers.hardware.cpu import Cpu, InstructionSet

# Variables that child processes inherit; all others, including secrets, are not passed on.
_PASSED_ON = (
    "PATH", "LANG", "LC_ALL", "TZ", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE",
    "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "NVIDIA_VISIBLE_DEVICES", "SLIPWAY_CPU_ISA",
)  # fmt: skip
# Further variables for git: where its configuration, its helpers' and SSH's are, the agent, and proxies.
_GIT_PREFIXES = (
    "HOME", "XDG_CONFIG_HOME", "SSH_AUTH_SOCK", "GIT_SSH_COMMAND", "GIT_CONFIG_GLOBAL", "GIT_SSL_CAINFO", "HTTP_PROXY",
    "HTTPS_PROXY", "NO_PROXY",
)  # fmt: skip
# Further variables for the package installer: indexes, certificates and caches.
_INSTALLER_PREFIXES = ("PIP_", "UV_", "XDG_CACHE_HOME", "HOME", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


def _read(variable: str, default: str) -> dict[str, str]:
    """A setting's environment variable and a description of its default, for the reference."""
    return {"variable": variable, "default": default}


@dataclass(frozen=True)
class Settings:
    """All settings from the environment, read once. The text below each field is its line in the reference."""

    home: Path = field(
        metadata=_read(
            "SLIPWAY_HOME",
            "`.slipway` in the checkout; of a wheel: `$XDG_DATA_HOME/slipway`, else `~/.local/share/slipway`",
        )
    )
    """The folder of all state: artifacts, environments, databases, logs, the signing key."""
    models: Path = field(
        metadata=_read("SLIPWAY_MODELS", "`models` in the checkout; of a wheel: in the current folder")
    )
    """The folder of model files."""
    docker_host: str | None = field(metadata=_read("DOCKER_HOST", "the engine that answers"))
    """The container engine."""
    image_registry: str | None = field(metadata=_read("SLIPWAY_IMAGE_REGISTRY", "none: images stay in the engine"))
    """Where images are pushed, `HOST:PORT/PATH`."""
    tracking_uri: str = field(metadata=_read("MLFLOW_TRACKING_URI", "an SQLite file in the home"))
    """The MLflow server that releases are registered in."""
    signing_key: Path = field(
        metadata=_read("SLIPWAY_SIGNING_KEY", "`keys/release.pem` in the home, made if it is not there")
    )
    """The private key that signs releases, PEM: P-256, P-384 or P-521."""
    trusted_keys: tuple[Path, ...] = field(metadata=_read("SLIPWAY_TRUSTED_KEYS", "the signing key's public half"))
    """Public keys that `pull` and `verify` trust, separated by `:`."""
    signing_certificate: Path | None = field(metadata=_read("SLIPWAY_SIGNING_CERTIFICATE", "none"))
    """The signing key's certificate chain, PEM, its own certificate first."""
    policy: Path | None = field(metadata=_read("SLIPWAY_POLICY", "none"))
    """A trust policy (TOML), which replaces `SLIPWAY_TRUSTED_KEYS`."""
    trivy_database: str | None = field(
        metadata=_read("SLIPWAY_TRIVY_DATABASE", "none: the database that is in the home")
    )
    """The OCI repository of Trivy's vulnerability database."""
    cold_store: str | None = field(metadata=_read("SLIPWAY_COLD_STORE", "none"))
    """Where `slipway gc --tier` moves unused versions, `s3://BUCKET/PREFIX`."""
    artifacts: str | None = field(metadata=_read("SLIPWAY_ARTIFACTS", "none: each home makes its own"))
    """The object store through which homes share artifacts, `s3://BUCKET/PREFIX`."""
    dagster_postgres: str | None = field(repr=False, metadata=_read("SLIPWAY_DAGSTER_POSTGRES", "SQLite in the home"))
    """Where Dagster keeps runs, events and schedules, `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`."""
    workers: Path | None = field(metadata=_read("SLIPWAY_WORKERS", "processes of this machine"))
    """A YAML file that says where workers run."""
    hub_endpoint: str = field(metadata=_read("HF_ENDPOINT", "`https://huggingface.co`"))
    """The model hub."""
    hub_token: str | None = field(repr=False, metadata=_read("HF_TOKEN", "none"))
    """The access token for the hub."""
    disk_floor: int = field(metadata=_read("SLIPWAY_DISK_FLOOR", "`2GiB`"))
    """How much of the home's disk always stays free: no stage starts, and no pull continues, below it."""
    locks: Path = field(metadata=_read("SLIPWAY_LOCKS", "`/run/lock`, else `/tmp`"))
    """The folder of the locks of this machine's GPUs and cores, shared by all homes and users."""
    cpu_limit: InstructionSet | None = field(metadata=_read("SLIPWAY_CPU_ISA", "what the CPU has"))
    """`avx2`: use this machine's CPU, also in containers, as if it had no AVX-512."""
    timezone: str = field(metadata=_read("SLIPWAY_TIMEZONE", "`UTC`"))
    """The time zone of schedules, such as `Europe/Berlin`."""
    ui_address: str = field(metadata=_read("SLIPWAY_UI_ADDRESS", "`http://127.0.0.1:3000`"))
    """The UI's address for others (MLflow: the next port): used in links, and accepted as a host name."""
    webhook: str | None = field(repr=False, metadata=_read("SLIPWAY_NOTIFY_WEBHOOK", "none"))
    """Where failures and refusals are reported, in Slack's format."""
    mail_server: str | None = field(repr=False, metadata=_read("SLIPWAY_NOTIFY_SMTP", "none"))
    """The server that mails are sent through, `smtps://USER:PASSWORD@HOST:PORT` or `smtp://HOST:PORT`."""
    mail_to: tuple[str, ...] = field(metadata=_read("SLIPWAY_NOTIFY_MAIL", "none"))
    """Who is mailed failures and refusals, separated by commas."""
    # The environments of workers, of the package installer and of git.
    child_environment: Mapping[str, str]
    installer_environment: Mapping[str, str] = field(repr=False)
    git_environment: Mapping[str, str] = field(repr=False)

    @property
    def mlflow_address(self) -> str:
        """The address of MLflow's pages: its server, or the one that `slipway ui` starts on the next port."""
        if self.tracking_uri.startswith("http"):
            from registry.tracking import shown  # noqa: PLC0415 - the command line starts without the registry

            return shown(self.tracking_uri).rstrip("/")
        place = urlsplit(self.ui_address)
        return place._replace(netloc=f"{place.hostname}:{(place.port or 80) + 1}").geturl()

    @property
    def cpu(self) -> Cpu:
        """This machine's CPU, limited by `SLIPWAY_CPU_ISA`."""
        from containers.hardware.cpu import this_cpu  # noqa: PLC0415 - the command line starts without it

        return this_cpu(self.cpu_limit)

    @property
    def engine_is_here(self) -> bool:
        """Whether the container engine runs on this machine, judged by its address."""
        return self.docker_host is None or self.docker_host.startswith("unix://")

    @property
    def notifies(self) -> bool:
        """Whether notifications of failures and refusals are configured."""
        return bool(self.webhook or self.mail_to)

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Parse the environment.

        Raises:
            SettingsError: a variable has an invalid value.
        """
        home = _folder(environment.get("SLIPWAY_HOME", _default_home(environment)), "SLIPWAY_HOME")
        key = Path(environment.get("SLIPWAY_SIGNING_KEY", home / "keys" / "release.pem")).expanduser().absolute()
        trusted = environment.get("SLIPWAY_TRUSTED_KEYS")
        return cls(
            home=home,
            models=_folder(
                environment.get("SLIPWAY_MODELS", str((CHECKOUT or Path.cwd()) / "models")), "SLIPWAY_MODELS"
            ),
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
            git_environment={
                name: value
                for name, value in environment.items()
                if name in _PASSED_ON or name.upper().startswith(_GIT_PREFIXES)
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
        raise SettingsError(
            f"`SLIPWAY_LOCKS` is {folder}, which is not a folder: make it, with mode 1777 if several users share it"
        )
    return folder


def _cpu_limit(text: str | None) -> InstructionSet | None:
    if text in {None, ""}:
        return None
    if text != "avx2":
        raise SettingsError(f"`SLIPWAY_CPU_ISA` is {text!r}: expected `avx2`, or nothing for what the CPU has")
    return "avx2"


def _timezone(name: str) -> str:
    if name == "UTC":  # needs no time zone database, which small images lack
        return name
    try:
        return ZoneInfo(name).key
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise SettingsError(
            f"`SLIPWAY_TIMEZONE` is {name!r}: expected a time zone of this system's `tzdata`, such as Europe/Berlin"
        ) from error


def _recipients(environment: Mapping[str, str]) -> tuple[str, ...]:
    given = environment.get("SLIPWAY_NOTIFY_MAIL", "")
    recipients = tuple(filter(None, (each.strip() for each in given.split(","))))
    server = urlsplit(environment.get("SLIPWAY_NOTIFY_SMTP", ""))
    if recipients and (server.scheme not in {"smtp", "smtps"} or not server.hostname):
        raise SettingsError(
            "`SLIPWAY_NOTIFY_MAIL` needs `SLIPWAY_NOTIFY_SMTP`: smtps://USER:PASSWORD@HOST:PORT or smtp://HOST:PORT"
        )
    return recipients


def _path(text: str | None) -> Path | None:
    return Path(text).expanduser().absolute() if text else None


def _postgres(text: str | None) -> str | None:
    """Return the address; an error does not repeat it, because it may hold a password."""
    if not text:
        return None
    if re.fullmatch(r"postgres(ql)?(\+\w+)?://[^/]+/[^/]+", text) is None:
        raise SettingsError(
            "`SLIPWAY_DAGSTER_POSTGRES` is not valid: expected postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
        )
    return text


def _token(name: str, environment: Mapping[str, str]) -> str | None:
    from registry.errors import NetworkSettingError  # noqa: PLC0415 - the command line starts without the registry
    from registry.network import token  # noqa: PLC0415

    value = environment.get(name)
    if not value:
        return None
    try:
        return token(name, value) or None
    except NetworkSettingError as error:
        raise SettingsError(str(error)) from error


def _tracking_uri(environment: Mapping[str, str]) -> str | None:
    """Return MLflow's address, with user and password from MLflow's own variables if they are set."""
    uri = environment.get("MLFLOW_TRACKING_URI") or None
    if uri is None or "MLFLOW_TRACKING_USERNAME" not in environment:
        return uri
    from registry.tracking import with_credentials  # noqa: PLC0415 - the command line starts without the registry

    return with_credentials(uri, environment)


def _default_home(environment: Mapping[str, str]) -> str:
    """The checkout's own; without one, the user's, for all folders: it holds gigabytes, and the signing key."""
    if CHECKOUT is not None:
        return str(CHECKOUT / ".slipway")
    return f"{environment.get('XDG_DATA_HOME') or '~/.local/share'}/slipway"


def _folder(text: str, name: str) -> Path:
    if not text:
        raise SettingsError(f"`{name}` is empty: set it to a folder, or unset it for the default")
    try:
        folder = Path(text).expanduser().absolute()
    except RuntimeError as error:  # this user has no home directory
        raise SettingsError(f"`{name}` is {text}, and this user has no home directory: set {name}") from error
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"`{name}` is {folder}, which is not a folder: choose another, or remove the file")
    return folder
