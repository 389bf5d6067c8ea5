"""An MLflow server, spoken to by its REST API (2.0) over one pool of connections, without importing MLflow."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Self
from urllib.parse import quote, unquote, urlencode, urlsplit

import urllib3
from urllib3.exceptions import HTTPError

from registry.backend import Line, Version, aliases_by_version
from registry.errors import RefusedError, TrackingError
from registry.tracking import reach, shown

_API = "/api/2.0/mlflow/"
_CONNECT_SECONDS, _READ_SECONDS = 5.0, 60.0
_BUSY = (429, 502, 503, 504)
_ATTEMPTS = 6
_REFUSED = {
    401: "asks for a user and a password, or does not know these: set `MLFLOW_TRACKING_USERNAME` and"
    " `MLFLOW_TRACKING_PASSWORD`",
    403: "does not permit it to this user, or not under this host name",
}


class Server:
    """A connection pool to the server at ``address``, whose user and password, if it has any, go into a header."""

    def __init__(self, address: str, connections: int = 16) -> None:
        reach(address)
        parts = urlsplit(address)
        self.address = shown(address).rstrip("/")
        self.headers = _authorization(unquote(parts.username or ""), unquote(parts.password or ""))
        self.pool = urllib3.PoolManager(
            maxsize=connections,
            timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=_READ_SECONDS),
            retries=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.clear()

    def names(self) -> list[str]:
        """Every registered model's name, sorted."""
        return sorted(item["name"] for item in self._pages("registered-models/search", "registered_models"))

    def line(self, name: str) -> Line | None:
        """The line, or None."""
        found = self._ask("GET", "registered-models/get", {"name": name}, absent="RESOURCE_DOES_NOT_EXIST")
        if found is None:
            return None
        model = found["registered_model"]
        aliases = {item["alias"]: str(item["version"]) for item in model.get("aliases", ())}
        return Line(name, aliases, _tags(model))

    def versions(self, name: str) -> list[Version]:
        """Its versions, newest first."""
        line = self.line(name)
        if line is None:
            return []
        aliases = aliases_by_version(line)
        listed = self._pages("model-versions/search", "model_versions", filter=f"name='{name}'")
        found = [self._version(item, aliases[str(item["version"])]) for item in listed]
        return sorted(found, key=lambda version: -int(version.version))

    def version(self, name: str, number: str) -> Version | None:
        """One version, or None; its aliases are not told."""
        query = {"name": name, "version": number}
        found = self._ask("GET", "model-versions/get", query, absent="RESOURCE_DOES_NOT_EXIST")
        return None if found is None else self._version(found["model_version"], ())

    def create_line(self, name: str, tags: Mapping[str, str]) -> None:
        """Make a registered model; nothing where there is one."""
        self._ask(
            "POST", "registered-models/create", {"name": name, "tags": _pairs(tags)}, absent="RESOURCE_ALREADY_EXISTS"
        )

    def create_version(self, name: str, source: str, tags: Mapping[str, str]) -> str:
        """Make a version; its number is larger than every one before, and nobody else's."""
        body = {"name": name, "source": source, "tags": _pairs(tags)}
        return str(self._told("POST", "model-versions/create", body)["model_version"]["version"])

    def delete_version(self, name: str, version: str) -> None:
        """Delete a version; nothing where there is none."""
        body = {"name": name, "version": version}
        self._ask("DELETE", "model-versions/delete", body, absent="RESOURCE_DOES_NOT_EXIST")

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Let the alias name the version."""
        self._told("POST", "registered-models/alias", {"name": name, "alias": alias, "version": version})

    def delete_alias(self, name: str, alias: str) -> None:
        """Let the alias name nothing."""
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
        """What is in a folder of the server's own artifact store: ``path`` (a name), ``is_dir``, ``file_size``."""
        answer = self._told("GET", "/api/2.0/mlflow-artifacts/artifacts", {"path": path})
        return list(answer.get("files", ()))

    def presigned(self, path: str) -> tuple[str, Mapping[str, str]] | None:
        """An address in the object store behind the server, and its headers; None where it can't give one."""
        answer = self._ask("GET", f"/api/2.0/mlflow-artifacts/presigned/{quote(path)}", {}, absent="*")
        return None if answer is None else (answer["url"], answer.get("headers") or {})

    def _version(self, item: Mapping[str, Any], aliases: tuple[str, ...]) -> Version:
        location = item.get("source", "")
        if location.startswith("models:") or not location:
            query = {"name": item["name"], "version": item["version"]}
            location = self._told("GET", "model-versions/get-download-uri", query)["artifact_uri"]
        created = datetime.fromtimestamp(int(item["creation_timestamp"]) / 1000, UTC)
        return Version(item["name"], str(item["version"]), aliases, _tags(item), location, created)

    def _pages(self, path: str, key: str, **query: str) -> Iterator[Mapping[str, Any]]:
        token = ""
        while True:
            page = self._told("GET", path, {"max_results": "1000", **query, **({"page_token": token} if token else {})})
            yield from page.get(key, ())
            token = page.get("next_page_token", "")
            if not token:
                return

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
        if answer.status in _REFUSED and code != "RESOURCE_DOES_NOT_EXIST":
            raise RefusedError(f"MLflow at {self.address} {_REFUSED[answer.status]} ({answer.status})")
        raise TrackingError(f"MLflow at {self.address}: {message or f'status {answer.status} for {path}'}")

    def _sent(self, method: str, address: str, options: Mapping[str, Any], attempts: int) -> urllib3.BaseHTTPResponse:
        for attempt in range(1, attempts + 1):
            try:
                answer = self.pool.request(method, address, redirect=False, **options)
            except HTTPError:
                if attempt == attempts:
                    raise
            else:
                if answer.status not in _BUSY or attempt == attempts:
                    return answer
            time.sleep(0.1 * 2**attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _json(self, answer: urllib3.BaseHTTPResponse) -> Mapping[str, Any]:
        try:
            found = json.loads(answer.data)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise TrackingError(f"what answers at {self.address} is no MLflow server: it does not speak JSON")
        return found

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except HTTPError as error:
            reason = str(error).rpartition(": ")[2] or type(error).__name__
            raise TrackingError(f"MLflow at {self.address} can't be reached: {reason}") from error


def _authorization(user: str, password: str) -> dict[str, str]:
    return urllib3.util.make_headers(basic_auth=f"{user}:{password}") if user else {}


def _tags(item: Mapping[str, Any]) -> dict[str, str]:
    return {tag["key"]: tag.get("value", "") for tag in item.get("tags", ())}


def _pairs(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in tags.items()]


def _error(data: bytes) -> tuple[str, str]:
    """Read MLflow's error document: its code, and the first line of its message."""
    try:
        found = json.loads(data)
        return str(found["error_code"]), str(found.get("message", "")).partition("\n")[0]
    except (ValueError, KeyError, TypeError):
        return "", ""
