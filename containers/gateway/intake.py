"""Limits how many request bodies of one key are read at a time, so that one key can't block another."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from weakref import WeakValueDictionary

from containers.gateway.errors import Refusal
from containers.gateway.keys import Key

# Parsing this takes a fraction of a millisecond, a megabyte ten to twenty.
_SMALL_BYTES = 16 * 1024
# Parsing large bodies takes at most a sixth of the event loop's time.
_REST = 5.0


class Intake:
    """Bounds the bodies that are read and parsed: ``each`` at a time per key. Further ones wait up to ``wait_s``."""

    def __init__(self, each: int, wait_s: float) -> None:
        self._each = each
        self._wait_s = wait_s
        self._places: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._turn = asyncio.Lock()
        self._free_at = 0.0

    @contextlib.asynccontextmanager
    async def place(self, key: Key, size: int | None) -> AsyncIterator[None]:
        """Hold a place for one body of this key until it is parsed. Small bodies need none.

        ``size`` is the declared size, which the server enforces; None if there is none.

        Raises:
            Refusal: 429 if no place became free within ``wait_s``.
        """
        if size is not None and size <= _SMALL_BYTES:
            yield
            return
        places = self._places.get(key.id)
        if places is None:
            places = self._places[key.id] = asyncio.Semaphore(self._each)
        try:
            async with asyncio.timeout(self._wait_s):
                await places.acquire()
        except TimeoutError:
            message = f"{self._each} other requests of your key are still being sent"
            raise Refusal(429, "too_many_bodies", message, retry_after=1, close=True) from None
        try:
            yield
        finally:
            places.release()

    @contextlib.asynccontextmanager
    async def turn(self, size: int) -> AsyncIterator[None]:
        """Parse a body of ``size`` bytes within the block. Large ones go one at a time, with pauses for other work."""
        if size <= _SMALL_BYTES:
            yield
            return
        async with self._turn:
            await asyncio.sleep(max(0.0, self._free_at - time.monotonic()))
            started = time.monotonic()
            try:
                yield
            finally:
                ended = time.monotonic()
                self._free_at = ended + _REST * (ended - started)
