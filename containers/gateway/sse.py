"""Passing on a stream of server-sent events: counts its tokens and detects whether it is complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DONE = b"data: [DONE]"
_LONGEST_EVENT = 1024 * 1024


class StreamError(Exception):
    """The engine's stream is not valid: an event does not end, or is not JSON."""


@dataclass
class StreamMeter:
    """Reads the events of a stream. ``hide_usage`` drops the last event, the usage, if it was not requested.

    ``completion_tokens`` is the engine's count as soon as it is known, and until then one per part of the text. A
    client that disconnects is charged this number.
    """

    hide_usage: bool = False
    prompt_tokens: int | None = None
    whole: bool = False
    pieces: int = 0
    _counted: int | None = None
    _rest: bytes = b""

    @property
    def completion_tokens(self) -> int:
        """Number of tokens of the answer so far."""
        return self.pieces if self._counted is None else self._counted

    def feed(self, data: bytes) -> bytes:
        """Take data from the engine; return the complete events, for the client.

        Raises:
            StreamError: The data is not a stream of JSON events.
        """
        events = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        self._rest = events.pop()
        if len(self._rest) > _LONGEST_EVENT:
            raise StreamError("an event does not end")
        return b"".join(event + b"\n\n" for event in events if self._passes(event))

    def _passes(self, event: bytes) -> bool:
        if not event.startswith(b"data:"):
            return True
        if event.startswith(DONE):
            self.whole = True
            return True
        try:
            document = json.loads(event[5:])
        except ValueError as error:
            raise StreamError("an event that is not JSON") from error
        if not isinstance(document, dict):
            raise StreamError("an event that is not an object")
        self.read(document)
        return bool(document.get("choices")) or "usage" not in document or not self.hide_usage

    def read(self, document: Mapping[str, Any]) -> None:
        """Read the usage from an event or a complete answer."""
        choices = document.get("choices")
        self.pieces += len(choices) if isinstance(choices, list) else 0
        usage = document.get("usage")
        if isinstance(usage, dict):
            self._counted = _count(usage.get("completion_tokens"), self.pieces)
            self.prompt_tokens = _count(usage.get("prompt_tokens"), 0) or None


def _count(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) and value >= 0 else otherwise
