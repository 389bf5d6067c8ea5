"""Protects web servers on loopback from other pages that the operator's browser has open.

Any web page can make a browser send requests to 127.0.0.1, also under a host name of the attacker's (DNS rebinding),
and neither Dagster's server nor MLflow's asks for a password. So a request must name one of the server's own addresses
as its host, and must come from one of its own pages or from no page. Another page may only link to a page here. GraphQL
requests by GET, which could change something, are always refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ORIGINS = "SLIPWAY_UI_ORIGINS"
"""The environment variable in which `slipway ui` passes a server its own origins, separated by commas."""
REFUSED = "Refused by Slipway"
"""What every refusal begins with."""
_NOT_PAGES = ("/graphql", "/api/", "/ajax-api/")
_FRAMES = (b"x-frame-options", b"SAMEORIGIN")


class Guard:
    """An ASGI application in front of another; it passes on requests of pages of ``origins`` (``http://HOST``) only."""

    def __init__(self, app: ASGIApp, origins: Iterable[str]) -> None:
        self._app = app
        self._origins = frozenset(origin.lower().rstrip("/") for origin in origins)
        self._hosts = frozenset(urlsplit(origin).netloc for origin in self._origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 403."""
        why = self.refusal(scope) if scope["type"] in {"http", "websocket"} else None
        if why is None:
            await self._app(scope, receive, _unframed(send) if scope["type"] == "http" else send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"text/plain; charset=utf-8"), _FRAMES]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": f"{REFUSED}: {why}\n".encode()})

    def refusal(self, scope: Scope) -> str | None:
        """Return why a request is refused, or None."""
        host, origin = _header(scope, b"host"), _header(scope, b"origin")
        site, mode = _header(scope, b"sec-fetch-site"), _header(scope, b"sec-fetch-mode")
        method, path = scope.get("method"), scope["path"]
        if host not in self._hosts:
            return "unknown host name; behind a proxy, set SLIPWAY_UI_ADDRESS to the address that browsers use"
        follows_link = method in {"GET", "HEAD"} and mode == "navigate" and not path.startswith(_NOT_PAGES)
        foreign = site not in {None, "same-origin", "none"} and not follows_link
        if foreign or (origin is not None and origin not in self._origins):
            return "the request comes from another page"
        if path.rstrip("/") == "/graphql" and method not in {None, "POST"}:
            return "GraphQL is answered by POST"
        return None


def origins_of(environment: Mapping[str, str]) -> list[str]:
    """The origins that `slipway ui` set; without any, every page is refused."""
    return [origin for origin in environment.get(ORIGINS, "").split(",") if origin]


def _header(scope: Scope, name: bytes) -> str | None:
    """The value of a header in lower case; values of a repeated header are joined and so match nothing."""
    found = [value for key, value in scope["headers"] if key == name]
    return b",".join(found).decode("latin-1").lower() if found else None


def _unframed(send: Send) -> Send:
    """Forbid other pages to show these pages in a frame (clickjacking)."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ())]
            if all(key.lower() != _FRAMES[0] for key, _ in headers):
                message = {**message, "headers": [*headers, _FRAMES]}
        await send(message)

    return sent
