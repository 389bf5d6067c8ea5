"""Access to MLflow. It is imported when needed, which takes three seconds, and its warnings are silenced."""

from __future__ import annotations

import logging
import os
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, quote, unquote, urlsplit

from registry.errors import TrackingError
from registry.file_locks import locked
from registry.network import proxy_for

if TYPE_CHECKING:
    from mlflow import MlflowClient

_CONNECT_SECONDS = 5.0
_URI, _USER, _PASSWORD = "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
# MLflow reads these when it is imported or used. It may report to nobody, draw nothing on a terminal that is ours, and
# give up on a server in seconds rather than in the minutes that its seven retries take.
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}


@contextmanager
def connected(tracking_uri: str) -> Iterator[MlflowClient]:
    """Yield a client of the tracking server or store at ``tracking_uri``. Tables are made on first use.

    MLflow's registry looks logged models up under its global tracking URI, so that is set meanwhile, and restored.

    Raises:
        TrackingError: It can't be reached, or what was asked of it failed.
    """
    prepare(tracking_uri)
    mlflow = _quiet_mlflow()
    try:
        with _global_uri(mlflow, tracking_uri):
            with _deprecations_ignored():  # it loads the store's modules
                uri = shown(tracking_uri) if _is_http(tracking_uri) else tracking_uri
                client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
            yield client
    except mlflow.MlflowException as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TrackingError(f"MLflow at {shown(tracking_uri)}: {first}") from error


@dataclass
class _Users:
    """The threads that use MLflow's one global tracking URI; those who want another wait for all of them."""

    uri: str = ""
    count: int = 0
    before: dict[str, str | None] = field(default_factory=dict)
    freed: threading.Condition = field(default_factory=threading.Condition)


_USERS = _Users()


@contextmanager
def _global_uri(mlflow: Any, tracking_uri: str) -> Iterator[None]:  # noqa: ANN401 - a module without types
    with _USERS.freed:
        _USERS.freed.wait_for(lambda: _USERS.count == 0 or _USERS.uri == tracking_uri)
        if _USERS.count == 0:
            _USERS.uri = tracking_uri
            _USERS.before = {name: os.environ.get(name) for name in (_URI, _USER, _PASSWORD)}
            mlflow.set_tracking_uri(shown(tracking_uri) if _is_http(tracking_uri) else tracking_uri)
            _tell_mlflow_who(tracking_uri)
        _USERS.count += 1
    try:
        yield
    finally:
        with _USERS.freed:
            _USERS.count -= 1
            if _USERS.count == 0:
                mlflow.set_tracking_uri(_USERS.before[_URI] or "")
                for name, value in _USERS.before.items():
                    os.environ.pop(name, None)
                    if value is not None:
                        os.environ[name] = value
                _USERS.freed.notify_all()


def _tell_mlflow_who(tracking_uri: str) -> None:
    """Give user and password to MLflow where it looks for them; those in an address it loses on the way to files."""
    parts = urlsplit(tracking_uri)
    if _is_http(tracking_uri) and parts.username:
        os.environ[_USER], os.environ[_PASSWORD] = unquote(parts.username), unquote(parts.password or "")


def _is_http(uri: str) -> bool:
    return urlsplit(uri).scheme in ("http", "https")


def _quiet_mlflow() -> Any:  # noqa: ANN401 - a module that ships no types to us
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with _deprecations_ignored():
        try:
            import mlflow  # noqa: PLC0415 - three seconds, for those who need it
        except ImportError as error:
            raise TrackingError(
                "only MLflow itself opens this store or these files: give the address of an MLflow server, or install"
                " `mlflow`"
            ) from error
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


@contextmanager
def _deprecations_ignored() -> Iterator[None]:
    """Ignore warnings about MLflow's use of its dependencies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        yield


def prepare(tracking_uri: str) -> None:
    """Make the tables of an SQLite store that does not exist yet (seconds, once), or reach the server.

    MLflow's migrations die badly: a process killed among them leaves a database that no later one can open. So they run
    on a file beside, which is renamed when they are done. Whoever lets MLflow's own server loose on a store calls this
    first.

    Raises:
        TrackingError: Nothing can be written there, or no server answers.
    """
    reach(tracking_uri)
    path = database_path(tracking_uri)
    if path is None or path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(path.name + ".tables.lock")):
            if not path.exists():
                _make_tables(path)
    except OSError as error:
        raise TrackingError(f"`{path}` can't be made: {error.strerror}") from error


def _make_tables(path: Path) -> None:
    beside = path.with_name(f".{path.name}.new")
    for leftover in (beside, beside.with_name(beside.name + "-journal")):
        leftover.unlink(missing_ok=True)
    mlflow = _quiet_mlflow()
    with _deprecations_ignored():
        mlflow.MlflowClient(tracking_uri=f"sqlite:///{beside}", registry_uri=f"sqlite:///{beside}")
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.rename(path)


def database_path(tracking_uri: str) -> Path | None:
    """Return the file of a ``sqlite:///`` URI; None for every other kind."""
    prefix = "sqlite:///"
    if not tracking_uri.startswith(prefix):
        return None
    name = tracking_uri.removeprefix(prefix).partition("?")[0]
    return Path(name) if name and not name.startswith(":") else None


def is_location(text: str) -> bool:
    """Whether a text can be a URI and a path; whoever may register a version chooses its location."""
    try:
        urlsplit(text)
        return b"\0" not in os.fsencode(unquote(text))
    except ValueError:
        return False


def local_folder(uri: str) -> Path | None:
    """Return the folder that a ``file:`` URI or an absolute path names; None for what is elsewhere, or malformed."""
    if not is_location(uri):
        return None
    parts = urlsplit(uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    return Path(uri) if uri.startswith("/") else None


def with_credentials(tracking_uri: str, environment: Mapping[str, str]) -> str:
    """Return the address of a server with the user and the password that MLflow's own variables name.

    ``MLFLOW_TRACKING_USERNAME`` and ``MLFLOW_TRACKING_PASSWORD``; what the address says itself stays.

    Raises:
        TrackingError: The address is malformed.
    """
    parts = _parts(tracking_uri)
    user = environment.get("MLFLOW_TRACKING_USERNAME")
    if not user or parts.scheme not in ("http", "https") or "@" in parts.netloc:
        return tracking_uri
    password = environment.get("MLFLOW_TRACKING_PASSWORD", "")
    return parts._replace(netloc=f"{quote(user, safe='')}:{quote(password, safe='')}@{parts.netloc}").geturl()


def _parts(tracking_uri: str) -> SplitResult:
    try:
        return urlsplit(tracking_uri)
    except ValueError:  # whose words may have the password in them
        raise TrackingError("the host in `MLFLOW_TRACKING_URI` or `--tracking-uri` is malformed: set it anew") from None


def shown(tracking_uri: str) -> str:
    """Return the URI without user and password, for messages."""
    parts = urlsplit(tracking_uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if parts.netloc else tracking_uri


def reach(tracking_uri: str) -> None:
    """Fail within seconds where nothing listens at an ``http`` address; every other store is opened when it is used.

    Raises:
        TrackingError: No server answers, or the address is none.
    """
    parts = _parts(tracking_uri)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except ValueError as error:
        raise TrackingError(f"`MLFLOW_TRACKING_URI` is {shown(tracking_uri)}: {error}") from error
    if proxy_for(tracking_uri) is not None:  # then it is the proxy that reaches it
        return
    try:
        socket.create_connection((parts.hostname, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise TrackingError(
            f"no MLflow server answers at {shown(tracking_uri)} ({reason}): start it, or set `MLFLOW_TRACKING_URI`"
        ) from error
