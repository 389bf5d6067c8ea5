"""Why an engine failed, from what it wrote: the root of its tracebacks, and how its processes ended.

vLLM runs in several processes, and one that fails takes the others along: a worker's error comes again, wrapped, as the
engine core's and as the API server's. Each line starts with its process and its level, where vLLM's logger wrote it.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from containers.sandbox.logs import redacted

# One line of a message; longer errors hold configurations and tensors.
MOST_CHARACTERS = 400
_PREFIX = re.compile(
    r"(?:\((?P<process>[A-Za-z][\w.-]*) pid=\d+\) ?)?"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)? \[[^\]]*\] ?)?"
)
# The processes that compute, by the beginnings of their names.
_COMPUTING = ("EngineCore", "VllmWorker", "Worker")
_TRACEBACK = "Traceback (most recent call last):"
_ERROR = re.compile(r"[A-Za-z_][\w.]*(?:: .*)?$")
# These say that something failed elsewhere, or that the process was told to end.
_CONSEQUENCE = re.compile(
    r"(?i)EngineDeadError|see (the )?(root cause|stack trace)|check the stack trace|^(\w+\.)*(CancelledError|"
    r"KeyboardInterrupt|SystemExit|BrokenPipeError|ConnectionResetError|EOFError)\b"
)
_DEAD = re.compile(
    r"EngineDeadError|EngineCore encountered a fatal error|(EngineCore|WorkerProc) failed to start|"
    r"Engine core initialization failed|engine core exited unexpectedly|Fatal Python error"
)
_FATAL = re.compile(r"Fatal Python error: (?P<what>[\w ]+)")
_UNEXPECTED = re.compile(r"engine core exited unexpectedly")
# What pydantic adds to a message, and the packages of an exception's class: neither helps.
_ADDED = re.compile(r"\s*(For further information visit \S+|\[type=\w+, input_value=.*)")
_PACKAGES = re.compile(r"^(\w+\.)+(?=\w+(:|$))")
_ENDED_BY = re.compile(r"Failed core proc.*'(?P<process>\w+)': -(?P<number>\d{1,2})\b")
_SAID = re.compile(r"(?i)\b(error|fatal|failed|illegal instruction|killed|segmentation fault)\b")
_SAID_QUIETLY = re.compile(r"(DEBUG|INFO|WARNING):")
_SIGNALS = {
    signal.SIGILL: "an illegal instruction: it was built for another CPU than this one",
    signal.SIGABRT: "an abort of its own code",
    signal.SIGBUS: "a bus error: the shared memory may be too small",
    signal.SIGFPE: "an arithmetic exception",
    signal.SIGKILL: "SIGKILL: by hand, or for want of memory",
    signal.SIGSEGV: "a segmentation fault",
    signal.SIGTERM: "SIGTERM: somebody told it to end",
}
# How Python's fault handler, which the sandbox turns on, calls them.
_FAULTS = {"Illegal instruction": signal.SIGILL, "Bus error": signal.SIGBUS, "Segmentation fault": signal.SIGSEGV}
# After these the same start may go another way: somebody else ended it.
_FROM_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


@dataclass(frozen=True)
class Failure:
    """How a server ended, or fails without having ended, and why.

    Attributes:
        ending: what happened, as what follows "the server": ``ended with status 1``.
        error: the engine's first error in one line, where it told one.
        log: where what it wrote is kept, where it could be.
        may_pass: whether the same again may go well.
    """

    ending: str
    error: str | None = None
    log: Path | None = None
    may_pass: bool = False

    def told(self, when: str = "") -> str:
        """Return it in one line, with ``when`` it happened behind the ending."""
        error = f": {self.error}" if self.error else ""
        return f"{self.ending}{when}{error}" + (f"; log: {self.log}" if self.log else "")

    def __str__(self) -> str:
        """Return it in one line."""
        return self.told()


def root_error(text: str) -> str | None:
    """Return the error that the others of a log follow from, in one line, or None where there is none.

    That is the first exception of the first traceback that is no consequence of another's, first among those of the
    processes that compute. Without a traceback it is what ended a process, or the last line that speaks of an error.
    The text is not trusted: what users wrote is left out, control characters are escaped, and the length is bounded.
    """
    lines = redacted(text).splitlines()
    errors = list(_errors(lines))
    roots = [(process, error) for process, error in errors if not _CONSEQUENCE.search(error)]
    computing = [error for process, error in roots if process.startswith(_COMPUTING)]
    fault = _FATAL.search(text)
    for chosen in computing:
        return one_line(chosen)
    if fault is not None:
        return _explained(fault["what"])
    for _, chosen in roots:
        return one_line(chosen)
    return _ended_by_signal(lines) or _last_said(lines)


def is_dead(text: str) -> bool:
    """Say whether a log tells that the engine is dead, whatever the process that listens still answers."""
    return _DEAD.search(redacted(text)) is not None


def one_line(text: str, most: int = MOST_CHARACTERS) -> str:
    """Return a text of somebody else's as one line that is safe to print: no control characters, bounded in length."""
    words = " ".join(text.split())
    safe = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in words[: most + 1])
    return safe if len(safe) <= most else f"{safe[: most - 1]}…"


def by_status(status: int) -> tuple[str, bool]:
    """Say how a process with such an exit status ended, and whether the same again may go otherwise.

    128 and the signal's number is what a shell and a container engine report of one that a signal ended.
    """
    try:
        number = signal.Signals(status - 128)
    except ValueError:
        return f"ended with status {status}", False
    return f"ended with status {status} ({_by_signal(number)})", number in _FROM_OUTSIDE


def _by_signal(number: signal.Signals) -> str:
    return _SIGNALS.get(number, number.name)


def _explained(fault: str) -> str:
    number = _FAULTS.get(fault.strip())
    return f"Fatal Python error: {fault.strip()}" + ("" if number is None else f" ({_by_signal(number)})")


def _ended_by_signal(lines: list[str]) -> str | None:
    """What vLLM says of a process that a signal ended: ``Failed core proc(s): {'EngineCore': -4}``, or less."""
    for line in lines:
        found = _ENDED_BY.search(line)
        if found is not None and int(found["number"]) in set(signal.Signals):
            return f"{found['process']} was ended by {_by_signal(signal.Signals(int(found['number'])))}"
    if any(_UNEXPECTED.search(line) for line in lines):
        return "the engine's process ended without a word: killed by hand, or for want of memory"
    return None


def _last_said(lines: list[str]) -> str | None:
    """The last line that speaks of an error, access logs and the like left out."""
    for line in reversed(lines):
        found = _PREFIX.match(line)
        message = line if found is None else line[found.end() :]
        quiet = found is not None and found["level"] in {"DEBUG", "INFO", "WARNING"}
        if _SAID.search(message) and not quiet and not _SAID_QUIETLY.match(message):
            return one_line(message)
    return None


def _errors(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Each traceback's process and error, however their lines are mixed, in the order in which they begin."""
    by_process: dict[str, list[tuple[int, str]]] = {}
    for number, line in enumerate(lines):
        found = _PREFIX.match(line)
        process, start = ("", 0) if found is None else (found["process"] or "", found.end())
        by_process.setdefault(process, []).append((number, line[start:]))
    begun = sorted((at, process, error) for process, own in by_process.items() for at, error in _of_one(own))
    for _, process, error in begun:
        yield process, error


def _of_one(lines: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """The errors at the end of one process's tracebacks, with the number of the line where each begins."""
    place = 0
    while place < len(lines):
        number, line = lines[place]
        place += 1
        if line.startswith(_TRACEBACK):
            frames = _indented(lines, place)
            place = frames
            if place < len(lines) and _ERROR.match(lines[place][1]):
                place = _indented(lines, place + 1)  # a message of several lines, as pydantic has it
                message = " ".join(_ADDED.sub("", text) for _, text in lines[frames:place])
                yield number, _PACKAGES.sub("", message)


def _indented(lines: list[tuple[int, str]], place: int) -> int:
    """The first place from ``place`` on whose line is not indented."""
    while place < len(lines) and lines[place][1][:1] in {" ", "\t"}:
        place += 1
    return place
