"""What a worker reports through Dagster Pipes, read from a file that the worker may do anything to."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from dagster import PipesMessageReader
from dagster_pipes import PipesDefaultMessageWriter

from pipeline.launchers.task import MESSAGES
from registry import untrusted

if TYPE_CHECKING:
    from dagster._core.pipes.context import PipesMessageHandler

_POLL_SECONDS = 0.05
_CHUNK = 1 << 16
# A message is a line; a run's are some thousands.
_LONGEST_MESSAGE, _MOST_BYTES = 1 << 20, 64 << 20


class WorkerMessages(PipesMessageReader):
    """Follows the messages' file in a worker's folder.

    Dagster's own reader opens the file by its path again and again, so that a link in its place is followed. This one
    makes the file anew before the worker starts, and reads that file however the path is changed afterwards.
    """

    def __init__(self, folder: Path) -> None:
        """Read what the worker of this folder reports."""
        self._folder = folder

    @contextmanager
    def read_messages(self, handler: PipesMessageHandler) -> Iterator[dict[str, Any]]:
        """Hand messages on as they come, until the block ends; yields what the worker must know."""
        ended = Event()
        with untrusted.create_file(self._folder, MESSAGES) as stream:
            thread = Thread(target=self._follow, args=(stream.fileno(), handler, ended), daemon=True)
            thread.start()
            try:
                yield {
                    PipesDefaultMessageWriter.FILE_PATH_KEY: str(self._folder / MESSAGES),
                    PipesDefaultMessageWriter.INCLUDE_STDIO_IN_MESSAGES_KEY: False,
                }
            finally:
                ended.set()
                thread.join()

    def no_messages_debug_text(self) -> str:
        """Where messages were looked for."""
        return f"Attempted to read messages from file {self._folder / MESSAGES}."

    def _follow(self, descriptor: int, handler: PipesMessageHandler, ended: Event) -> None:
        try:
            for line in _lines(descriptor, ended):
                handler.handle_message(json.loads(line))
        except Exception:  # noqa: BLE001 - whatever a worker wrote: Dagster logs it, and the run goes on
            handler.report_pipes_framework_exception(f"{type(self).__name__}: not a message", sys.exc_info())


def _lines(descriptor: int, ended: Event) -> Iterator[bytes]:
    """Whole lines as they come; ``ValueError`` where one is too long, or all of them are too much."""
    rest, total = b"", 0
    while True:
        last = ended.is_set()  # asked before reading, so that what was written last is read
        while chunk := os.read(descriptor, _CHUNK):
            total += len(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
            if len(rest) > _LONGEST_MESSAGE or total > _MOST_BYTES:
                raise ValueError(f"more than {_LONGEST_MESSAGE} bytes in a line, or {_MOST_BYTES} in all")
        if last:
            return
        ended.wait(_POLL_SECONDS)
