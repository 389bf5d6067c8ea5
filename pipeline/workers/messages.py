"""Reads a worker's Dagster Pipes messages from a file that the worker may replace or damage."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

from dagster import PipesMessageReader
from dagster_pipes import PipesDefaultMessageWriter

from pipeline.workers.launchers.messages import lines
from pipeline.workers.launchers.task import MESSAGES
from registry import untrusted

if TYPE_CHECKING:
    from dagster._core.pipes.context import PipesMessageHandler
    from dagster_pipes import PipesParams


class WorkerMessages(PipesMessageReader):
    """Follows the file of messages in a worker's folder.

    Dagster's own reader opens the path repeatedly, and so would follow a link that the worker puts there. This reader
    creates the file before the worker starts and keeps it open.
    """

    def __init__(self, folder: Path) -> None:
        """Read the messages of the worker with this folder."""
        self._folder = folder

    @contextmanager
    def read_messages(self, handler: PipesMessageHandler) -> Iterator[PipesParams]:
        """Pass messages on as they arrive, until the block ends; yield the parameters for the worker."""
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
        """The file that was read, for Dagster's message about missing messages."""
        return f"Attempted to read messages from file {self._folder / MESSAGES}."

    def _follow(self, descriptor: int, handler: PipesMessageHandler, ended: Event) -> None:
        try:
            for line in lines(descriptor, ended):
                handler.handle_message(json.loads(line))
        except Exception:  # noqa: BLE001 - a worker may write anything; Dagster logs it, and the run continues
            handler.report_pipes_framework_exception(f"{type(self).__name__}: not a message", sys.exc_info())
