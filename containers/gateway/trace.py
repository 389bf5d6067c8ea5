"""Request ids: one for people, and W3C trace context (https://www.w3.org/TR/trace-context/)."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

REQUEST_ID, TRACEPARENT, TRACESTATE = b"x-request-id", b"traceparent", b"tracestate"
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}", re.ASCII)
_PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_STATE_BYTES = 512


@dataclass(frozen=True)
class Trace:
    """The ids of a request, in hexadecimal as in the headers."""

    request_id: str
    trace_id: str
    span_id: str
    flags: str
    state: bytes | None

    @property
    def parent(self) -> str:
        """``traceparent`` for the next hop: this span is the parent."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"

    def headers(self) -> dict[str, str]:
        """Return the headers for the replica."""
        found = {"x-request-id": self.request_id, "traceparent": self.parent}
        if self.state is not None:
            found["tracestate"] = self.state.decode("ascii")
        return found


def begin(headers: Mapping[bytes, bytes]) -> Trace:
    """Continue the client's ids if they are valid, else make new ones.

    A malformed ``traceparent`` starts a new trace and drops ``tracestate``, as the recommendation says (4.3).
    """
    given = headers.get(REQUEST_ID, b"")
    request_id = given.decode() if _ID.fullmatch(given) else secrets.token_hex(16)
    found = _PARENT.fullmatch(headers.get(TRACEPARENT, b""))
    if found is None or not _is_valid(found):
        return Trace(request_id, secrets.token_hex(16), secrets.token_hex(8), "01", None)
    state = headers.get(TRACESTATE)
    if state is not None and (
        len(state) > _STATE_BYTES or not state.isascii() or not state.decode("ascii").isprintable()
    ):
        state = None
    return Trace(request_id, found[2].decode(), secrets.token_hex(8), found[4].decode(), state)


def _is_valid(found: re.Match[bytes]) -> bool:
    """Whether a ``traceparent`` is valid: not version ff, no ids of zeros, exactly four fields in version 00."""
    version, trace, parent, _, rest = found.groups()
    return (
        version != b"ff" and trace.strip(b"0") != b"" and parent.strip(b"0") != b"" and not (version == b"00" and rest)
    )
