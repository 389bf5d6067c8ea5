"""What a worker reports through Dagster Pipes, read from a file that the worker may do anything to."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from dagster import PipesMessageReader
from dagster_pipes import PipesDefaultMessageWriter

from pipeline.workers.launchers.messages import lines
from pipeline.workers.launchers.task import MESSAGES
from registry import untrusted

if TYPE_CHECKING:
    from dagster._core.pipes.context import PipesMessageHandler


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
            for line in lines(descriptor, ended):
                handler.handle_message(json.loads(line))
        except Exception:  # noqa: BLE001 - whatever a worker wrote: Dagster logs it, and the run goes on
            handler.report_pipes_framework_exception(f"{type(self).__name__}: not a message", sys.exc_info())
