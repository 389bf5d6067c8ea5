"""The rules for all requests over a network: hub, model registry, container registries, engines, notifications.

- *Schemes.* ``https``; ``http`` only where the configured address says so. A redirect never leads from ``https`` to
  ``http``, nor to another scheme.
- *Hosts.* Credentials go to the host that they were configured for. A redirect to another host is followed for reading
  alone, and without them.
- *Certificates.* Always verified: by the authorities of the file or folder that ``MLFLOW_TRACKING_SERVER_CERT_PATH``
  (for MLflow), ``REQUESTS_CA_BUNDLE`` or ``SSL_CERT_FILE`` name, the first of them that is set; else by the system's
  and certifi's. There is no way to switch it off.
- *Proxies.* ``HTTPS_PROXY``, ``HTTP_PROXY`` and ``NO_PROXY``, in either case of letters; never to this machine.
- *Secrets.* A token that no header can carry is refused by the name of its variable, before a library shows its value.
- *Answers.* Nothing is asked for compressed, and what comes compressed is refused. A body has a largest size and a
  longest time, whatever trickles in (`within`, `Pace`, `watched`).

This module reads those standard variables itself, and nothing else of the environment: every library would, each in its
own way. What is honoured by which client is a table in ``docs/network.md``.
"""

from __future__ import annotations

import base64
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPSConnection
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from registry.errors import NetworkSettingError

_AUTHORITIES = ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
MLFLOW_AUTHORITIES = "MLFLOW_TRACKING_SERVER_CERT_PATH"
_PORTS = {"http": 80, "https": 443}
_READING = ("GET", "HEAD")
# Time in which a whole document, or the next part of a file, must arrive.
ANSWER_SECONDS = 120.0
# The minimum speed of a download, in bytes per second; a link of 1 Mbit/s has 125,000.
_SLOWEST_BYTES_PER_SECOND = 50_000


def tls(*first: str, environment: Mapping[str, str] = os.environ) -> ssl.SSLContext:
    """Return what certificates of servers are verified with.

    ``first`` are variables that count before the common ones.

    Raises:
        NetworkSettingError: A variable names neither a file nor a folder of certificates.
    """
    for name in (*first, *_AUTHORITIES):
        place = environment.get(name)
        if place:
            return _trusting(name, Path(place))
    context = ssl.create_default_context()
    try:
        import certifi  # noqa: PLC0415 - there where an HTTP library brought it
    except ImportError:
        return context
    context.load_verify_locations(cafile=certifi.where())
    return context


def proxy_for(address: str) -> str | None:
    """Return the proxy's URL through which an address is reached; None where it is reached directly.

    Raises:
        NetworkSettingError: The address, or the proxy's, is malformed, or the proxy is none of HTTP's.
    """
    parts = _split(address)
    if not parts.hostname or is_loopback(parts.hostname) or proxy_bypass(parts.hostname):
        return None
    found = getproxies().get(parts.scheme)
    if found is None:
        return None
    proxy = found if "://" in found else f"http://{found}"
    by = _split(proxy)
    if by.scheme not in _PORTS or not by.hostname:
        raise _unusable(by, parts)
    return proxy


def connection(address: str, seconds: float, *first: str) -> tuple[HTTPConnection, str, dict[str, str]]:
    """Return a connection that is not open yet, what to ask it for, and headers that it takes: through a proxy or not.

    ``seconds`` is how long nothing may come; ``first`` as `tls` has it.

    Raises:
        NetworkSettingError: The address is none of HTTP's, or a proxy can't be used.
    """
    parts = _split(address)
    if parts.scheme not in _PORTS or not parts.hostname:
        raise NetworkSettingError(f"`{parts.scheme}` addresses can't be read: {_without_secrets(address)}")
    path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    if not all("!" <= character <= "~" for character in path):
        raise NetworkSettingError(f"an address has characters that must be escaped: {_without_secrets(address)}")
    proxy = proxy_for(address)
    if proxy is None:
        return _direct(parts, seconds, first), path, {}
    by = _split(proxy)
    # A tunnel is asked for in the clear, with the proxy's password: never of a proxy that is to be reached over TLS.
    if by.scheme != "http" and parts.scheme != "http":
        raise _unusable(by, parts)
    asked = _proxy_headers(by)
    if parts.scheme == "http":
        return _direct(by, seconds, ()), f"http://{parts.netloc.rpartition('@')[2]}{path}", asked
    tunnel = HTTPSConnection(by.hostname or "", by.port or _PORTS["http"], timeout=seconds, context=tls(*first))
    tunnel.set_tunnel(parts.hostname, parts.port or _PORTS["https"], headers=asked)
    return tunnel, path, {}


def mlflow_token(environment: Mapping[str, str] = os.environ) -> str:
    """Return the token of ``MLFLOW_TRACKING_TOKEN``, empty where there is none; ``NetworkSettingError`` as `token`."""
    return token("MLFLOW_TRACKING_TOKEN", environment.get("MLFLOW_TRACKING_TOKEN", ""))


def redirect_problem(method: str, here: str, there: str) -> str | None:
    """Return why a redirect is not followed; None if it is."""
    try:
        before, after = _split(here), _split(there)
    except NetworkSettingError as error:
        return f"it redirects, and {error}"
    if after.scheme in _PORTS and not after.hostname:
        return "it redirects to an address without a host"
    if after.scheme not in _PORTS or (before.scheme, after.scheme) == ("https", "http"):
        return f"it redirects from {before.scheme} to {after.scheme}"
    if method not in _READING and not same_origin(here, there):
        return f"it redirects what is written to another host, {after.hostname}"
    return None


def answer_problem(method: str, here: str, there: str | None, content_encoding: str) -> str | None:
    """Return why an answer is refused before its body is read; None if it may be read or followed.

    ``there`` is the absolute address of its redirect, if it is one. The text continues a sentence that begins with the
    name of the server.
    """
    problem = None if there is None else redirect_problem(method, here, there)
    if problem is not None:
        return f"is not followed: {problem}"
    try:
        refuse_encoding(content_encoding)
    except NetworkSettingError as error:
        return str(error)
    return None


def same_origin(one: str, other: str) -> bool:
    """Whether two addresses have the same scheme, host and port; False if one is malformed."""
    try:
        return _origin(one) == _origin(other)
    except NetworkSettingError:
        return False


def refuse_encoding(content_encoding: str) -> None:
    """Refuse a ``Content-Encoding`` with which a body differs from what is stored.

    Raises:
        NetworkSettingError: The body is encoded. The message continues a sentence that begins with the sender.
    """
    if content_encoding.strip().lower() not in {"", "identity"}:
        raise NetworkSettingError("sent a compressed answer, which was not asked for")


def within(chunks: Iterable[bytes], most_bytes: int, seconds: float) -> Iterator[bytes]:
    """Yield the chunks of a document, as long as it is within its limits.

    Args:
        chunks: The body as it comes, a piece for each read.
        most_bytes: How many bytes it may have.
        seconds: How long it may take from now on.

    Raises:
        NetworkSettingError: It exceeds them. The message goes on after the name of who sent it.
    """
    deadline, count = time.monotonic() + seconds, 0
    for chunk in chunks:
        count += len(chunk)
        if count > most_bytes:
            raise NetworkSettingError(f"sent more than {most_bytes} bytes as one answer")
        if time.monotonic() > deadline:
            raise NetworkSettingError(f"took more than {seconds:g} s for one answer")
        yield chunk


class Pace:
    """Checks a download's speed: `ANSWER_SECONDS` to begin, then at least 50,000 bytes per second."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._count = 0

    def add(self, count: int) -> None:
        """Count bytes that came, over however many connections.

        Raises:
            NetworkSettingError: They came too slowly. The message goes on after the name of who sent them.
        """
        self._count += count
        seconds = time.monotonic() - self._started
        if seconds > ANSWER_SECONDS + self._count / _SLOWEST_BYTES_PER_SECOND:
            raise NetworkSettingError(
                f"sent {self._count} bytes in {seconds:.0f} s, which is too slow: run again, what came is kept"
            )


@contextmanager
def watched(connection: socket.socket, pieces: Callable[[], int] = int) -> Iterator[None]:
    """End a connection over which no piece came for `ANSWER_SECONDS`; whoever reads finds that it ended too soon.

    A socket's own timeout counts anew with each byte, and never ends one whose bytes trickle in. ``pieces`` tells how
    many came; without it, all that is done in this context is one.
    """
    done = threading.Event()

    def watch() -> None:
        seen = pieces()
        while not done.wait(ANSWER_SECONDS):
            if pieces() == seen:
                with suppress(OSError):
                    # Not `SSLSocket.shutdown`, which also takes the encryption off what is still read.
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)
                return
            seen = pieces()

    threading.Thread(target=watch, name="watch a connection", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def is_loopback(host: str) -> bool:
    """Whether a host name refers to this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def token(name: str, value: str) -> str:
    """Return a token without surrounding white space.

    Raises:
        NetworkSettingError: A header can't carry it; the message names the variable, and not the value.
    """
    stripped = value.strip()
    if not all("!" <= character <= "~" for character in stripped):
        raise NetworkSettingError(
            f"`{name}` holds a character that no token has, such as a line break or a space: set it anew"
        )
    return stripped


def _split(address: str) -> SplitResult:
    """Split an address; ``NetworkSettingError`` if it is malformed, before a library shows its password."""
    with suppress(ValueError):
        parts = urlsplit(address)
        (parts.hostname or "").encode("idna")
        if parts.port != 0:
            return parts
    raise NetworkSettingError(f"the host or the port of an address is malformed: {_without_secrets(address)}")


def _without_secrets(address: str) -> str:
    """The address without user and password, query and fragment, as far as it can be told of a malformed one."""
    scheme, _, rest = address.partition("?")[0].partition("#")[0].rpartition("://")
    return f"{scheme}{'://' if scheme else ''}{rest.rpartition('@')[2]}"[:200]


def _origin(address: str) -> tuple[str, str | None, int | None]:
    parts = _split(address)
    return parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme)


def _direct(parts: SplitResult, seconds: float, first: tuple[str, ...]) -> HTTPConnection:
    host = parts.hostname or ""
    if parts.scheme == "https":
        return HTTPSConnection(host, parts.port, timeout=seconds, context=tls(*first))
    return HTTPConnection(host, parts.port, timeout=seconds)


def _unusable(proxy: SplitResult, asked: SplitResult) -> NetworkSettingError:
    return NetworkSettingError(
        f"a `{proxy.scheme}` proxy can't be used: set {asked.scheme.upper()}_PROXY to http://HOST:PORT"
    )


def _proxy_headers(proxy: SplitResult) -> dict[str, str]:
    if not proxy.username:
        return {}
    known = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(known.encode()).decode()}"}


def _trusting(name: str, place: Path) -> ssl.SSLContext:
    try:
        if place.is_dir():
            return ssl.create_default_context(capath=str(place))
        return ssl.create_default_context(cafile=str(place))
    except OSError as error:  # ssl.SSLError is one
        reason = error.strerror or "it holds no certificate in PEM"
        raise NetworkSettingError(f"`{name}` names `{place}`, which can't be used: {reason}") from error
