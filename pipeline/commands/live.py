"""A live display at the bottom of a terminal: one line for each running task, with its progress and duration."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

_BAR_CELLS = 20
_REFRESHES_PER_SECOND = 4


@dataclass
class _Row:
    label: str
    text: str
    share: float | None
    started: float


class LiveDisplay:
    """Lines below the printed text that are updated in place; without a terminal nothing is shown.

    The display is visible only inside its ``with`` block. It never hides the cursor, so even a SIGKILL leaves the
    terminal usable. All methods may be called from any thread.
    """

    def __init__(self, console: Console) -> None:
        """Draw on ``console``, on which other text may be printed at the same time."""
        self._console = console
        self._lock = threading.RLock()
        self._rows: dict[Hashable, _Row] = {}
        self._live: Live | None = None
        self._open = False

    @property
    def shows(self) -> bool:
        """Whether lines are visible: inside the block, on a terminal that can move its cursor."""
        return self._open and self._console.is_interactive

    def set(self, key: Hashable, label: str, text: str, share: float | None = None) -> None:
        """Show ``text`` in the line of ``key``, with a progress bar if a ``share`` (0 to 1) is given."""
        with self._lock:
            if not self.shows:
                return
            before = self._rows.get(key)
            safe = "".join(filter(str.isprintable, text))  # the text may contain names from outside
            self._rows[key] = _Row(label, safe, share, time.monotonic() if before is None else before.started)
            if self._live is None:
                self._live = Live(
                    console=self._console, get_renderable=self._drawn, refresh_per_second=_REFRESHES_PER_SECOND,
                    transient=True, redirect_stdout=False,
                )  # fmt: skip
                self._live.start()
                self._console.show_cursor(show=True)
            self._live.refresh()

    def drop(self, *keys: Hashable) -> None:
        """Remove the lines of these keys; the display ends with its last line."""
        with self._lock:
            for key in keys:
                self._rows.pop(key, None)
            if not self._rows and self._live is not None:
                self._live.stop()
                self._live = None

    def drop_group(self, first: Hashable) -> None:
        """Remove the lines whose keys are tuples that begin with ``first``."""
        with self._lock:
            self.drop(*(key for key in self._rows if isinstance(key, tuple) and key[0] == first))

    def clear(self) -> None:
        """Remove all lines."""
        with self._lock:
            self.drop(*self._rows)

    def __enter__(self) -> Self:
        self._open = True
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        with self._lock:
            self._open = False
            self.clear()

    def _drawn(self) -> RenderableType:
        from registry.terminal import printable

        now = time.monotonic()
        table = Table.grid(padding=(0, 1))
        for _ in range(4):
            table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        # Without our lock: rich holds its own here, and a thread that holds ours may wait for rich's.
        for row in list(self._rows.values()):
            bar = "" if row.share is None else ProgressBar(total=1.0, completed=row.share, width=_BAR_CELLS)
            seconds = Text(f"{now - row.started:.0f} s")
            table.add_row(_SPINNER, Text(printable(row.label), style="bold"), seconds, bar, Text(printable(row.text)))
        return table


_SPINNER = Spinner("line")
