"""A client of a cluster's HTTP API, which retries for a while if the API does not answer."""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from pipeline.errors import UnansweredError, WorkerFailed
from registry.network import proxy_for, tls

# How long requests are retried while a server restarts or is busy.
_PATIENCE_SECONDS = 60.0
_PAUSE_SECONDS = 1.0
_LONGEST_SAID = 300
_SECONDS = 60.0
# The authorities that `registry.network` trusts by default.
SYSTEM_AUTHORITIES = "`REQUESTS_CA_BUNDLE`, `SSL_CERT_FILE` or this system's authorities"


def client(
    address: str, headers: Mapping[str, str] | None = None, verify: ssl.SSLContext | None = None
) -> httpx.Client:
    """Return an HTTP client for an address, under the policy of `registry.network`; it follows no redirects."""
    proxy = proxy_for(address)
    return httpx.Client(
        base_url=address, headers=headers, verify=verify or tls(), proxy=proxy, timeout=_SECONDS, trust_env=False
    )


class Interface:
    """The HTTP API at one address, over connections that are kept open.

    Errors name it ``name``, and say that its certificate is checked against ``authority``.
    """

    def __init__(self, name: str, connect: Callable[[], httpx.Client], authority: str) -> None:
        """Send requests through the client that ``connect`` returns."""
        self.name = name
        self.connect = connect
        self.authority = authority
        self._client: httpx.Client | None = None

    def find(self, path: str, **parameters: str) -> httpx.Response | None:
        """Get a path; None if it does not exist.

        Raises:
            UnansweredError: the server does not answer.
            WorkerFailed: the server refuses.
        """
        reply = self._asked("GET", path, params=parameters)
        return None if reply.status_code == httpx.codes.NOT_FOUND else self._accepted(reply)

    def document(self, path: str, **parameters: str) -> dict[str, Any] | None:
        """Get the JSON object at a path; None if the path does not exist.

        Raises:
            UnansweredError: the server does not answer.
            WorkerFailed: the server refuses, or the answer is not a JSON object, for example from a proxy.
        """
        reply = self.find(path, **parameters)
        if reply is None:
            return None
        try:
            found = reply.json()
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise WorkerFailed(f"{self.name} did not answer {path} with a JSON object: {_said(reply)}")
        return found

    def send(self, method: str, path: str, **content: Any) -> httpx.Response:  # noqa: ANN401 - as httpx takes it
        """Send a request to a path.

        Raises:
            UnansweredError: the server does not answer.
            WorkerFailed: the server refuses.
        """
        return self._accepted(self._asked(method, path, **content))

    def end(self, method: str, path: str, **content: Any) -> None:  # noqa: ANN401 - as httpx takes it
        """Send a request that stops something, and ignore errors: it may have ended already."""
        with contextlib.suppress(httpx.HTTPError):
            self._connected().request(method, path, **content)

    def _connected(self) -> httpx.Client:
        """The open client; a new one after an error, with the certificate that is then configured."""
        if self._client is None:
            self._client = self.connect()
        return self._client

    def close(self) -> None:
        """Close the connections; later requests open new ones."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _asked(self, method: str, path: str, **content: Any) -> httpx.Response:  # noqa: ANN401 - as httpx takes it
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                reply = self._connected().request(method, path, **content)
                if not reply.is_server_error and reply.status_code != httpx.codes.TOO_MANY_REQUESTS:
                    return reply
                why, pause = _said(reply), _pause(reply)
            except httpx.TransportError as error:
                self.close()
                why, pause = str(error), _PAUSE_SECONDS
                if "CERTIFICATE_VERIFY_FAILED" in why:
                    raise WorkerFailed(
                        f"the certificate of {self.name} is not trusted (checked against {self.authority}): {why}"
                    ) from error
            if time.monotonic() + pause > deadline:
                raise UnansweredError(f"{self.name} does not answer: {why}")
            time.sleep(pause)

    def _accepted(self, reply: httpx.Response) -> httpx.Response:
        if reply.is_error:
            asked = f"{reply.request.method} {reply.request.url.path}"
            raise WorkerFailed(f"{self.name} refused {asked}: {_said(reply)} ({reply.status_code})")
        return reply


def _said(reply: httpx.Response) -> str:
    """The text of an error: Kubernetes and Ray send JSON with a ``message``."""
    try:
        document = reply.json()
        words = document["message"] if isinstance(document, dict) else reply.text
    except (ValueError, KeyError, RecursionError):
        words = reply.text
    return " ".join(str(words).split())[:_LONGEST_SAID]


def _pause(reply: httpx.Response) -> float:
    """Seconds until the next try: the answer's ``Retry-After`` if it has one."""
    said = reply.headers.get("Retry-After", "")
    return max(float(said), _PAUSE_SECONDS) if said.isdecimal() else _PAUSE_SECONDS
