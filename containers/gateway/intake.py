"""Taking bodies in so that one key's don't stand in the way of another's: few of each at a time, in turn."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from weakref import WeakValueDictionary

from containers.gateway.errors import Refusal
from containers.gateway.keys import Key

# Parsed within a fraction of a millisecond; a megabyte takes ten or twenty.
_SMALL_BYTES = 16 * 1024
# Of the event loop's time, large bodies get one part in six.
_REST = 5.0


class Intake:
    """What bounds the bodies that are read and parsed. ``each`` key has so many at a time; more wait ``wait_s``."""

    def __init__(self, each: int, wait_s: float) -> None:
        self._each = each
        self._wait_s = wait_s
        self._places: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._turn = asyncio.Lock()
        self._free_at = 0.0

    @contextlib.asynccontextmanager
    async def place(self, key: Key, size: int | None) -> AsyncIterator[None]:
        """Hold a place for one body of this key, from its first byte until it is parsed; a small one needs none.

        ``size`` is as the request declares it, which the server holds it to; None where it does not.

        Raises:
            Refusal: 429 where the key's other bodies did not come within the time that a body has.
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
        """Parse a body of ``size`` bytes within the block: of the large ones one, and then all else for a while."""
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
