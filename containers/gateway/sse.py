"""Passing on a stream of server-sent events: counts its tokens and detects whether it is complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

DONE = b"data: [DONE]"
_LONGEST_EVENT = 1024 * 1024


class StreamError(Exception):
    """The engine's stream is not valid: an event does not end, or is not JSON."""


@dataclass
class StreamMeter:
    """Reads the events of a stream. ``hide_usage`` drops the last event, the usage, if it was not requested.

    ``model`` is the name that the client asked for, which the engine has another for: answers get the client's.
    ``completion_tokens`` is the engine's count as soon as it is known, and until then one per part of the text. A
    client that disconnects is charged this number.
    """

    model: str
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
        return b"".join(passed + b"\n\n" for event in events if (passed := self._passed(event)) is not None)

    def _passed(self, event: bytes) -> bytes | None:
        """The event as the client gets it; None for a usage that it did not ask for."""
        if not event.startswith(b"data:"):
            return event
        if event.startswith(DONE):
            self.whole = True
            return event
        try:
            document = json.loads(event[5:])
        except ValueError as error:
            raise StreamError("an event that is not JSON") from error
        if not isinstance(document, dict):
            raise StreamError("an event that is not an object")
        self.read(document)
        if self.hide_usage and "usage" in document and not document.get("choices"):
            return None
        renamed = self.renamed(document)
        return event if renamed is None else b"data: " + renamed

    def renamed(self, document: Mapping[str, object]) -> bytes | None:
        """An event or a complete answer with the client's name of the model; None where it has that already."""
        if document.get("model", self.model) == self.model:
            return None
        return json.dumps({**document, "model": self.model}, separators=(",", ":")).encode()

    def read(self, document: Mapping[str, object]) -> None:
        """Read the usage from an event or a complete answer."""
        choices = document.get("choices")
        self.pieces += len(choices) if isinstance(choices, list) else 0
        usage = document.get("usage")
        if isinstance(usage, dict):
            self._counted = _count(usage.get("completion_tokens"), self.pieces)
            self.prompt_tokens = _count(usage.get("prompt_tokens"), 0) or None


def _count(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) and value >= 0 else otherwise
