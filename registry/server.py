"""An MLflow server, spoken to by its REST API (2.0) over one pool of connections, without importing MLflow.

The server is not trusted: each answer is bounded in bytes, as sent (a compressed one, which nobody asked for, is
refused), in values, in depth and in seconds, a list over all of its pages, and one of another form than MLflow's is a
``TrackingError`` like any other.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self
from urllib.parse import quote, unquote, urlencode, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError

from registry import network
from registry.backend import EXPERIMENT, Line, Version, aliases_by_version
from registry.bounded_json import Bounds, DocumentError, read_json
from registry.errors import NetworkSettingError, RefusedError, TrackingError
from registry.tracking import reach, shown

_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+: [\t -~]*")
_API = "/api/2.0/mlflow/"
_CONNECT_SECONDS, _READ_SECONDS = 5.0, 60.0
_ANSWER_SECONDS = network.ANSWER_SECONDS
# A page of 1,000 versions with their tags takes one or two megabytes, and a line's tags are its audit trail.
_BOUNDS = Bounds(bytes=32 << 20, values=500_000, depth=16)
_MOST_ENTRIES = 100_000
_LIST_SECONDS = 300.0
_CHUNK = 1 << 16
_LONGEST_SHOWN = 500
_BUSY = (429, 502, 503, 504)
_ATTEMPTS = 6
_REFUSED = {
    401: "asks for a user and a password, or does not know these: set `MLFLOW_TRACKING_USERNAME` and"
    " `MLFLOW_TRACKING_PASSWORD`, or `MLFLOW_TRACKING_TOKEN`",
    403: "does not permit it to this user, or not under this host name",
}


@dataclass(frozen=True)
class _Answer:
    """A whole answer: its status, and its bytes as they came."""

    status: int
    data: bytes


class _Connection(HTTPConnection):
    """One whose headers do not trickle in for ever."""

    def getresponse(self) -> urllib3.HTTPResponse:  # type: ignore[override]  # as urllib3 itself has it
        with network.watched(self.sock):
            return super().getresponse()


class _TlsConnection(_Connection, HTTPSConnection):
    pass


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class MlflowServer:
    """A connection pool to the server at ``address``, whose user and password, if it has any, go into a header."""

    def __init__(self, address: str, connections: int = 16) -> None:
        reach(address)
        parts = urlsplit(address)
        self.address = shown(address).rstrip("/")
        self.headers = _authorization(unquote(parts.username or ""), unquote(parts.password or ""))
        options: dict[str, Any] = {
            "maxsize": connections,
            "timeout": urllib3.Timeout(connect=_CONNECT_SECONDS, read=_READ_SECONDS),
            "retries": False,
            "ssl_context": network.tls(network.MLFLOW_AUTHORITIES),
        }
        proxy = network.proxy_for(self.address)
        self.pool = urllib3.PoolManager(**options) if proxy is None else _through(proxy, options)
        self.pool.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.clear()

    def artifact_root(self) -> str | None:
        """Where the experiment `EXPERIMENT` keeps its files; None if the experiment does not exist."""
        query = {"experiment_name": EXPERIMENT}
        found = self._ask("GET", "experiments/get-by-name", query, absent="RESOURCE_DOES_NOT_EXIST")
        with self._understood():
            return None if found is None else str(found["experiment"]["artifact_location"])

    def names(self) -> list[str]:
        """Every registered model's name, sorted."""
        with self._understood():
            return sorted(str(item["name"]) for item in self._pages("registered-models/search", "registered_models"))

    def line(self, name: str) -> Line | None:
        """The line, or None."""
        found = self._ask("GET", "registered-models/get", {"name": name}, absent="RESOURCE_DOES_NOT_EXIST")
        if found is None:
            return None
        with self._understood():
            model = found["registered_model"]
            aliases = {str(item["alias"]): str(item["version"]) for item in model.get("aliases", ())}
            return Line(name, aliases, _tags(model))

    def versions(self, name: str) -> list[Version]:
        """Return its versions, newest first; none if the line does not exist.

        Raises:
            TrackingError: The server can't be reached, or answers with a version of another line.
        """
        line = self.line(name)
        if line is None:
            return []
        aliases = aliases_by_version(line)
        with self._understood():
            listed = self._pages("model-versions/search", "model_versions", filter=f"name='{name}'")
            found = [self._version(item, aliases[str(item["version"])]) for item in listed]
        for version in found:
            if version.name != name:
                raise self._another(version, f"one of `{name}`")
        return sorted(found, key=lambda version: -int(version.version))

    def version(self, name: str, number: str) -> Version | None:
        """Return one version, without its aliases; None if it does not exist.

        Raises:
            TrackingError: The server can't be reached, or answers with another version.
        """
        query = {"name": name, "version": number}
        found = self._ask("GET", "model-versions/get", query, absent="RESOURCE_DOES_NOT_EXIST")
        if found is None:
            return None
        with self._understood():
            version = self._version(found["model_version"], ())
        if (version.name, version.version) != (name, number):
            raise self._another(version, f"version {number} of `{name}`")
        return version

    def create_line(self, name: str, tags: Mapping[str, str]) -> None:
        """Make a registered model; do nothing if it exists."""
        self._ask(
            "POST", "registered-models/create", {"name": name, "tags": _pairs(tags)}, absent="RESOURCE_ALREADY_EXISTS"
        )

    def create_version(self, name: str, source: str, tags: Mapping[str, str]) -> str:
        """Make a version; its number is unique and larger than all before."""
        body = {"name": name, "source": source, "tags": _pairs(tags)}
        with self._understood():
            return str(self._told("POST", "model-versions/create", body)["model_version"]["version"])

    def delete_version(self, name: str, version: str) -> None:
        """Delete a version; do nothing if it does not exist."""
        body = {"name": name, "version": version}
        self._ask("DELETE", "model-versions/delete", body, absent="RESOURCE_DOES_NOT_EXIST")

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Point the alias at the version."""
        self._told("POST", "registered-models/alias", {"name": name, "alias": alias, "version": version})

    def delete_alias(self, name: str, alias: str) -> None:
        """Remove the alias."""
        body = {"name": name, "alias": alias}
        self._ask("DELETE", "registered-models/alias", body, absent="RESOURCE_DOES_NOT_EXIST")

    def set_line_tag(self, name: str, key: str, value: str) -> None:
        """Set a tag of the line."""
        self._told("POST", "registered-models/set-tag", {"name": name, "key": key, "value": value})

    def set_version_tag(self, name: str, version: str, key: str, value: str) -> None:
        """Set a tag of a version."""
        body = {"name": name, "version": version, "key": key, "value": value}
        self._told("POST", "model-versions/set-tag", body)

    def proxied(self, path: str) -> str:
        """The address under which the server itself hands out the file at ``path`` of its artifact store."""
        return f"{self.address}/api/2.0/mlflow-artifacts/artifacts/{quote(path)}"

    def list_proxied(self, path: str) -> list[Mapping[str, Any]]:
        """What is in a folder of the server's own artifact store: ``path`` (a name in it), ``is_dir``, ``size``."""
        with self._understood():
            answer = self._told("GET", "/api/2.0/mlflow-artifacts/artifacts", {"path": path})
            return [
                {"path": _name(item["path"]), "is_dir": bool(item["is_dir"]), "size": int(item.get("file_size", 0))}
                for item in answer.get("files", ())
            ]

    def presigned(self, path: str) -> tuple[str, Mapping[str, str]] | None:
        """An address in the object store behind the server, and its headers; None where there is none to follow."""
        answer = self._ask("GET", f"/api/2.0/mlflow-artifacts/presigned/{quote(path)}", {}, absent="*")
        with self._understood():
            if answer is None or network.redirect_problem("GET", self.address, _text(answer["url"])) is not None:
                return None
            return answer["url"], _headers(answer.get("headers"))

    def _version(self, item: Mapping[str, Any], aliases: tuple[str, ...]) -> Version:
        location = _text(item.get("source") or "")
        if location.startswith("models:") or not location:
            query = {"name": item["name"], "version": item["version"]}
            location = _text(self._told("GET", "model-versions/get-download-uri", query)["artifact_uri"])
        created = datetime.fromtimestamp(int(item["creation_timestamp"]) / 1000, UTC)
        number = str(int(item["version"]))
        return Version(_text(item["name"]), number, aliases, _tags(item), location, created)

    def _another(self, version: Version, asked: str) -> TrackingError:
        got = f"version {version.version} of `{version.name[:_LONGEST_SHOWN]}`"
        return TrackingError(f"MLflow at {self.address} answers with {got} where {asked} was asked for")

    def _pages(self, path: str, key: str, **query: str) -> Iterator[Mapping[str, Any]]:
        token, count, deadline = "", 0, time.monotonic() + _LIST_SECONDS
        seen = set[str]()
        while True:
            page = self._told("GET", path, {"max_results": "1000", **query, **({"page_token": token} if token else {})})
            entries = list(page.get(key, ()))
            yield from entries
            count += len(entries)
            token = _text(page.get("next_page_token") or "")
            if not token:
                return
            if token in seen or count > _MOST_ENTRIES or time.monotonic() > deadline:
                raise TrackingError(f"MLflow at {self.address} lists `{key}` without end: stopped after {count}")
            seen.add(token)

    def _told(self, method: str, path: str, content: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._ask(method, path, content, absent="") or {}

    def _ask(self, method: str, path: str, content: Mapping[str, Any], *, absent: str) -> Mapping[str, Any] | None:
        """Send one request; None where the server answers with the error code ``absent`` (``*``: with any).

        A server that is busy or can't be reached is asked again, with growing pauses, where asking twice does no harm.
        """
        address = f"{self.address}{path if path.startswith('/') else _API + path}"
        options: dict[str, Any] = {"headers": self.headers}
        if method == "GET":
            address += f"?{urlencode(content)}" if content else ""
        else:
            options |= {"body": json.dumps(content), "headers": {**self.headers, "Content-Type": "application/json"}}
        again = not path.endswith("/create")
        with self._explained():
            answer = self._sent(method, address, options, attempts=_ATTEMPTS if again else 1)
        if answer.status == 200:
            return self._json(answer)
        code, message = _error(answer.data)
        if absent and (code == absent or (absent == "*" and answer.status not in _REFUSED)):
            return None
        if 300 <= answer.status < 400:
            raise TrackingError(
                f"MLflow at {self.address} redirects ({answer.status}), which is not followed: set"
                " `MLFLOW_TRACKING_URI` to where it leads"
            )
        if answer.status in _REFUSED and code != "RESOURCE_DOES_NOT_EXIST":
            raise RefusedError(f"MLflow at {self.address} {_REFUSED[answer.status]} ({answer.status})")
        raise TrackingError(f"MLflow at {self.address}: {message or f'status {answer.status} for {path}'}")

    def _sent(self, method: str, address: str, options: Mapping[str, Any], attempts: int) -> _Answer:
        for attempt in range(1, attempts + 1):
            try:
                answer = self._read(
                    self.pool.request(method, address, redirect=False, preload_content=False, **options)
                )
            except HTTPError:
                if attempt == attempts:
                    raise
            else:
                if answer.status not in _BUSY or attempt == attempts:
                    return answer
            time.sleep(0.1 * 2**attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _read(self, answer: urllib3.BaseHTTPResponse) -> _Answer:
        """Read an answer as it came, within its bounds; a connection with more to say is closed."""
        whole = False
        try:
            network.refuse_encoding(answer.headers.get("Content-Encoding", ""))
            pieces = iter(lambda: answer.read1(_CHUNK, decode_content=False), b"")
            data = b"".join(network.within(pieces, _BOUNDS.bytes, _ANSWER_SECONDS))
            whole = True
        except NetworkSettingError as error:
            raise TrackingError(f"MLflow at {self.address} {error}") from error
        finally:
            (answer.release_conn if whole else answer.close)()
        return _Answer(answer.status, data)

    def _json(self, answer: _Answer) -> Mapping[str, Any]:
        try:
            found = read_json(answer.data, _BOUNDS)
        except DocumentError as error:
            raise TrackingError(f"what answers at {self.address} is not an MLflow server: {error}") from error
        if not isinstance(found, dict):
            raise TrackingError(f"what answers at {self.address} is not an MLflow server: expected a JSON object")
        return found

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """Take an answer of another form than MLflow's for what it is."""
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
            what = f"{type(error).__name__}: {error}"[:100]
            raise TrackingError(
                f"MLflow at {self.address} answers in a form that is not MLflow's ({what!r})"
            ) from error

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except HTTPError as error:
            reason = str(error).rpartition(": ")[2] or type(error).__name__
            raise TrackingError(f"MLflow at {self.address} can't be reached: {reason}") from error


def _authorization(user: str, password: str) -> dict[str, str]:
    """As MLflow has it: user and password, or else the token."""
    if user:
        return urllib3.util.make_headers(basic_auth=f"{user}:{password}")
    token = network.mlflow_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _through(proxy: str, options: Mapping[str, Any]) -> urllib3.PoolManager:
    parts = urlsplit(proxy)
    known = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else None
    headers = urllib3.util.make_headers(proxy_basic_auth=known) if known else None
    return urllib3.ProxyManager(shown(proxy), proxy_headers=headers, **options)


def _tags(item: Mapping[str, Any]) -> dict[str, str]:
    return {_text(tag["key"]): _text(tag.get("value") or "") for tag in item.get("tags", ())}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} in place of a text")
    return value


def _name(value: object) -> str:
    """A file's or a folder's own name, and nothing that leads elsewhere."""
    name = _text(value)
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        raise ValueError("a path in place of a name")
    return name


def _headers(value: object) -> dict[str, str]:
    found = value or {}
    if not isinstance(found, dict):
        raise TypeError("no headers")
    headers = {_text(name): _text(word) for name, word in found.items()}
    if not all(_HEADER.fullmatch(f"{name}: {word}") for name, word in headers.items()):
        raise ValueError("a header that can't be sent")
    return headers


def _pairs(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in tags.items()]


def _error(data: bytes) -> tuple[str, str]:
    """Read MLflow's error document: its code, and the first line of its message."""
    try:
        found = read_json(data, _BOUNDS)
        return str(found["error_code"])[:_LONGEST_SHOWN], str(found.get("message", ""))[:_LONGEST_SHOWN].partition(
            "\n"
        )[0]
    except (DocumentError, KeyError, TypeError, AttributeError):
        return "", ""
