"""Web servers on loopback answer their own pages, and no other page that the operator's browser has open.

A browser sends to 127.0.0.1 what any page tells it to, and a name of the attacker's can lead there too (DNS rebinding).
Neither Dagster's server nor MLflow's asks for a password. So each request must name one of the server's own addresses
as its host, and come from one of its own pages, or from no page at all; another page may only lead to a page here. What
changes something by GET is refused to everybody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ORIGINS = "SLIPWAY_UI_ORIGINS"
"""The variable by which `slipway ui` tells a server its own origins, separated by commas."""
REFUSED = "Refused by Slipway"
"""What every refusal begins with."""
_NOT_PAGES = ("/graphql", "/api/", "/ajax-api/")
_FRAMES = (b"x-frame-options", b"SAMEORIGIN")


class Guard:
    """An ASGI application in front of another, which it keeps from pages that are not ``origins`` (``http://HOST``)."""

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

    def refusal(self, scope: Mapping[str, Any]) -> str | None:
        """Say why a request is refused; None where it is not."""
        host, origin = _header(scope, b"host"), _header(scope, b"origin")
        site, mode = _header(scope, b"sec-fetch-site"), _header(scope, b"sec-fetch-mode")
        method, path = scope.get("method"), scope["path"]
        if host not in self._hosts:
            return "this server has another host name; SLIPWAY_UI_ADDRESS says which it has behind a proxy"
        follows_link = method in {"GET", "HEAD"} and mode == "navigate" and not path.startswith(_NOT_PAGES)
        foreign = site not in {None, "same-origin", "none"} and not follows_link
        if foreign or (origin is not None and origin not in self._origins):
            return "the request comes from another page"
        if path.rstrip("/") == "/graphql" and method not in {None, "POST"}:
            return "GraphQL is answered by POST"
        return None


def origins_of(environment: Mapping[str, str]) -> list[str]:
    """The origins that `slipway ui` told; none are answered where it told none."""
    return [origin for origin in environment.get(ORIGINS, "").split(",") if origin]


def _header(scope: Mapping[str, Any], name: bytes) -> str | None:
    """A header in lower case; one that comes twice is none that is known."""
    found = [value for key, value in scope["headers"] if key == name]
    return b",".join(found).decode("latin-1").lower() if found else None


def _unframed(send: Send) -> Send:
    """Have no other page show these in a frame, where a click on it would be a click here."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ())]
            if all(key.lower() != _FRAMES[0] for key, _ in headers):
                message = {**message, "headers": [*headers, _FRAMES]}
        await send(message)

    return sent
