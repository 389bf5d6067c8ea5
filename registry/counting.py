"""Progress of long operations: counts, times, and reports one line from time to time.

Imports the standard library alone: a copy of this file is in every worker's environment, as ``slipway_counting``.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

# Who waits wants to see something after two seconds, and then at least every ten.
FIRST_SECONDS = 2.0
EVERY_SECONDS = 10.0
_BEAT_SECONDS = 0.5
_LINE = re.compile(r"(?P<what>.+): (?P<done>[\d,.]+) of (?P<total>[\d,.]+) (?P<unit>[A-Za-z]+) after \d")


@dataclass(frozen=True)
class Count:
    """How far something is. Its text is for people, and `is_count` knows it again.

    Attributes:
        what: what is done, as a word or a name.
        done: how much of it, in units, ``before`` included.
        total: how much there is.
        unit: of what, in the plural; ``MB`` for bytes.
        seconds: since the start.
        before: how much was there at the start; it took no time.
        detail: what else is worth telling.
    """

    what: str
    done: float
    total: float
    unit: str
    seconds: float
    before: float = 0.0
    detail: str = ""

    @property
    def rate(self) -> float | None:
        """Units a second since the start; None as long as there are none."""
        return (self.done - self.before) / self.seconds if self.seconds > 0 and self.done > self.before else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the end at the rate so far; None where that is not known."""
        return None if self.rate is None else max(0.0, self.total - self.done) / self.rate

    def __str__(self) -> str:
        """Return it as ``cloze: 120 of 2,000 items after 9 s, 13/s, 2 min left (detail)``."""
        digits = 1 if self.unit == "MB" and self.total < 10 else 0
        told = f"{self.what}: {self.done:,.{digits}f} of {self.total:,.{digits}f} {self.unit}"
        parts = [f"{told} after {duration(self.seconds)}"]
        if self.rate is not None:
            parts.append(_speed(self.rate, self.unit))
        if self.seconds_left:
            parts.append(f"{duration(self.seconds_left)} left")
        return ", ".join(parts) + (f" ({self.detail})" if self.detail else "")


def is_count(line: str) -> tuple[str, float] | None:
    """Return what a line is about and how much of it is done, 0 to 1; None for a line that is no count."""
    found = _LINE.match(line)
    if found is None:
        return None
    try:
        done, total = (float(found[name].replace(",", "")) for name in ("done", "total"))
    except ValueError:  # dots and commas alone
        return None
    return found["what"], min(1.0, done / total) if total else 1.0


def duration(seconds: float) -> str:
    """Return a duration as people say it: ``35 s``, ``12 min``, ``3.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Counter:
    """Reports a `Count`: after two seconds, then every ten, and at its end.

    As a context manager it also does so while nothing is added. ``add`` may be called from several threads.
    """

    def __init__(
        self, report: Callable[[str], None], what: str, total: float, unit: str, *, before: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """Start the clock; for bytes, ``total`` and what is added are in MB and ``unit`` is ``MB``."""
        self._report = report
        self._what, self._total, self._unit, self._before = what, total, unit, before
        self._done = before
        self._detail = ""
        self._clock = clock
        self._started = clock()
        self._due = self._started + FIRST_SECONDS
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def add(self, amount: float = 1.0, detail: str = "") -> None:
        """Count so much more as done, and report it if that is due."""
        with self._lock:
            self._done += amount
            self._detail = detail or self._detail
        self.beat()

    def beat(self) -> None:
        """Report if that is due, or if all is done and it took long enough to be told."""
        with self._lock:
            now = self._clock()
            complete = self._done >= self._total and now - self._started >= FIRST_SECONDS and not self._ended.is_set()
            if now < self._due and not complete:
                return
            self._due = now + EVERY_SECONDS
            if complete:
                self._ended.set()
            elif self._ended.is_set():
                return
            count = Count(
                self._what, self._done, self._total, self._unit, now - self._started, self._before, self._detail
            )
        self._report(str(count))

    def __enter__(self) -> Self:
        threading.Thread(target=self._beats, daemon=True).start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self._ended.set()

    def _beats(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            self.beat()


def _speed(rate: float, unit: str) -> str:
    if unit == "MB":
        return f"{rate:,.0f} MB/s" if rate >= 10 else f"{rate:.1f} MB/s"
    if rate < 1:
        return f"{duration(1 / rate)} each"
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s"
