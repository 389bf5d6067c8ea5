"""Finds why an engine failed in its log: the first error among its tracebacks, and how its processes ended.

vLLM runs in several processes. When one fails the others fail too: a worker's error appears again, wrapped, in the log
lines of the engine core and of the API server. Lines of vLLM's logger start with the process and the level.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from containers.sandbox.log_lines import PREFIX
from containers.sandbox.logs import redacted
from registry.served_files import REFUSAL, REFUSED

# The length of a one-line message; longer errors contain configurations and tensors.
MOST_CHARACTERS = 400
# Prefixes of the names of processes that compute.
_COMPUTING = ("EngineCore", "VllmWorker", "Worker")
_TRACEBACK = "Traceback (most recent call last):"
_ERROR = re.compile(r"[A-Za-z_][\w.]*(?:: .*)?$")
# These errors follow from another one, or from a signal to stop.
_CONSEQUENCE = re.compile(
    r"(?i)EngineDeadError|see (the )?(root cause|stack trace)|check the stack trace|^(\w+\.)*(CancelledError|"
    r"KeyboardInterrupt|SystemExit|BrokenPipeError|ConnectionResetError|EOFError)\b"
)
_DEAD = re.compile(
    r"EngineDeadError|EngineCore encountered a fatal error|(EngineCore|WorkerProc) failed to start|"
    r"Engine core initialization failed|engine core exited unexpectedly|Fatal Python error"
)
_REFUSED = re.compile(re.escape(REFUSAL) + r"(?P<why>.+)")
_FATAL = re.compile(r"Fatal Python error: (?P<what>[\w ]+)")
_UNEXPECTED = re.compile(r"engine core exited unexpectedly")
# Left out of messages: what pydantic appends, and the package of an exception's class.
_ADDED = re.compile(r"\s*(For further information visit \S+|\[type=\w+, input_value=.*)")
_PACKAGES = re.compile(r"^(\w+\.)+(?=\w+(:|$))")
_ENDED_BY = re.compile(r"Failed core proc.*'(?P<process>\w+)': -(?P<number>\d{1,2})\b")
_SAID = re.compile(r"(?i)\b(error|fatal|failed|illegal instruction|killed|segmentation fault)\b")
_SAID_QUIETLY = re.compile(r"(DEBUG|INFO|WARNING):")
_SIGNALS = {
    signal.SIGILL: "an illegal instruction: it was built for another CPU",
    signal.SIGABRT: "abort()",
    signal.SIGBUS: "a bus error: the shared memory may be too small",
    signal.SIGFPE: "an arithmetic exception",
    signal.SIGKILL: "SIGKILL: by hand, or out of memory",
    signal.SIGSEGV: "a segmentation fault",
    signal.SIGTERM: "SIGTERM: stopped from outside",
}
# Their names in the output of Python's fault handler, which the sandbox turns on.
_FAULTS = {"Illegal instruction": signal.SIGILL, "Bus error": signal.SIGBUS, "Segmentation fault": signal.SIGSEGV}
# Signals from outside, after which a second start may succeed.
_FROM_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


@dataclass(frozen=True)
class Failure:
    """How a server stopped, or what is wrong with it while it runs, and why.

    Attributes:
        ending: what happened, as a continuation of "the server": ``ended with status 1``.
        error: the engine's first error in one line, if its log has one.
        log: the file that holds its log, if it could be saved.
        may_pass: whether another try may succeed.
    """

    ending: str
    error: str | None = None
    log: Path | None = None
    may_pass: bool = False

    def told(self, when: str = "") -> str:
        """Return one line: the ending, ``when`` it happened, the error and the log."""
        error = f": {self.error}" if self.error else ""
        return f"{self.ending}{when}{error}" + (f"; log: {self.log}" if self.log else "")

    def __str__(self) -> str:
        """Return it as one line."""
        return self.told()


def root_error(text: str) -> str | None:
    """Return the first error of a log, which caused the others, in one line; None if it has none.

    That is what the runtime's loader refused, if it did. Else it is the first traceback's exception that does not
    follow from another one; tracebacks of processes that compute come first. Without a traceback it is the signal that
    ended a process, or the last line that mentions an error.
    The text is not trusted: prompts are left out, control characters are escaped, and the length is limited.
    """
    refused = _REFUSED.search(redacted(text))
    if refused is not None:
        return one_line(refused["why"])
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
    """Return whether a log says that the engine is dead; the API server may still answer."""
    return _DEAD.search(redacted(text)) is not None


def one_line(text: str, most: int = MOST_CHARACTERS) -> str:
    """Return untrusted text as one line that is safe to print: control characters escaped, length limited."""
    words = " ".join(text.split())
    safe = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in words[: most + 1])
    return safe if len(safe) <= most else f"{safe[: most - 1]}…"


def by_status(status: int) -> tuple[str, bool]:
    """Describe an exit status, and return whether another try may succeed.

    Shells and container engines report a process that a signal ended with 128 plus the signal's number.
    """
    if status == REFUSED:
        return f"ended with status {status} (refused to load what was not signed)", False
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
    """Find a process that a signal ended: ``Failed core proc(s): {'EngineCore': -4}``, or a line without the number."""
    for line in lines:
        found = _ENDED_BY.search(line)
        if found is not None and int(found["number"]) in set(signal.Signals):
            return f"{found['process']} was ended by {_by_signal(signal.Signals(int(found['number'])))}"
    if any(_UNEXPECTED.search(line) for line in lines):
        return "the engine's process ended without an error message: killed by hand, or out of memory"
    return None


def _last_said(lines: list[str]) -> str | None:
    """Return the last line that mentions an error, without access logs and lines below the level ERROR."""
    for line in reversed(lines):
        found = PREFIX.match(line)
        message = line if found is None else line[found.end() :]
        quiet = found is not None and found["level"] in {"DEBUG", "INFO", "WARNING"}
        if _SAID.search(message) and not quiet and not _SAID_QUIETLY.match(message):
            return one_line(message)
    return None


def _errors(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Yield each traceback's process and error, in the order of their first lines; their lines may be interleaved."""
    by_process: dict[str, list[tuple[int, str]]] = {}
    for number, line in enumerate(lines):
        found = PREFIX.match(line)
        process, start = ("", 0) if found is None else (found["process"] or "", found.end())
        by_process.setdefault(process, []).append((number, line[start:]))
    begun = sorted((at, process, error) for process, own in by_process.items() for at, error in _of_one(own))
    for _, process, error in begun:
        yield process, error


def _of_one(lines: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Yield the errors of one process's tracebacks, each with the number of the traceback's first line."""
    place = 0
    while place < len(lines):
        number, line = lines[place]
        place += 1
        if line.startswith(_TRACEBACK):
            frames = _indented(lines, place)
            place = frames
            if place < len(lines) and _ERROR.match(lines[place][1]):
                place = _indented(lines, place + 1)  # a message of several lines, like pydantic's
                message = " ".join(_ADDED.sub("", text) for _, text in lines[frames:place])
                yield number, _PACKAGES.sub("", message)


def _indented(lines: list[tuple[int, str]], place: int) -> int:
    """Return the first index from ``place`` on whose line is not indented."""
    while place < len(lines) and lines[place][1][:1] in {" ", "\t"}:
        place += 1
    return place
