"""What a container wrote, kept for whoever asks why it failed, with prompts left out."""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path
from typing import Any

import docker
import requests
from docker.models.containers import Container

# Servers log a request as `prompt: '…'`, `"prompt": "…"` or a list of messages; errors quote it. What follows the word
# on its line is the user's.
_SECRET = re.compile(
    r"""(?ix)(["']?\b(?:prompt|messages|content|input|input_value|text)\b["']?\s*[:=]\s*)(?!None\b|null\b)\S.*$"""
)
_LEFT_OUT = "[left out]"
_KEEP_LINES = 20_000
_KEEP_BYTES = 16_000_000
_KEEP_FILES = 40
# A terminal acts on control characters, and whoever reads the log has one.
_ESCAPED = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


def redacted(text: str) -> str:
    """Return a log without what users wrote: the rest of a line after ``prompt:`` and its like."""
    return "\n".join(_SECRET.sub(rf"\1{_LEFT_OUT}", line) for line in text.splitlines())


def read(container: Container, since: float = 0.0, *, timestamps: bool = False) -> str:
    """Return the end of what a container wrote, as it is: 20,000 lines and 16 MB at most.

    Args:
        container: running or not.
        since: seconds since 1970 from which on it counts; 0 for all.
        timestamps: whether each line begins with its time.

    Raises:
        docker.errors.APIError, requests.RequestException: the engine can't tell.
    """
    kept: deque[bytes] = deque()
    size = 0
    wanted: dict[str, Any] = {"since": since} if since > 0 else {}
    for chunk in container.logs(stream=True, follow=False, tail=_KEEP_LINES, timestamps=timestamps, **wanted):
        kept.append(chunk)
        size += len(chunk)
        while size > _KEEP_BYTES:
            size -= len(kept.popleft())
    return b"".join(kept).decode(errors="replace")


def path_of(container: Container, folder: Path) -> Path:
    """Where `keep` writes what a container wrote."""
    return folder / f"{container.name}.container.log"


def keep(container: Container, folder: Path) -> Path | None:
    """Write what a container wrote, redacted, into ``folder``; the last lines of it, of the last containers.

    None where it can't be had, or not be written: a log is no reason to fail.
    """
    try:
        text = read(container, timestamps=True)
        folder.mkdir(parents=True, exist_ok=True)
        path = path_of(container, folder)
        path.write_text(redacted(text).translate(_ESCAPED) + "\n")
        kept = sorted(folder.glob("*.container.log"), key=lambda each: each.stat().st_mtime)
        for old in kept[:-_KEEP_FILES]:
            old.unlink(missing_ok=True)
    except (docker.errors.APIError, requests.RequestException, OSError):  # a full disk, or another who removes logs
        return None
    return path
