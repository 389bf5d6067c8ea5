"""Saves containers' logs without prompts, so that failures can be explained later."""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path
from typing import Any

import docker
import requests
from docker.models.containers import Container

# Servers log a request as `prompt: '…'`, `"prompt": "…"` or a list of messages, and errors quote it. The rest of the
# line after such a word is left out.
_SECRET = re.compile(
    r"""(?ix)(["']?\b(?:prompt|messages|content|input|input_value|text)\b["']?\s*[:=]\s*)(?!None\b|null\b)\S.*$"""
)
_LEFT_OUT = "[left out]"
_KEEP_LINES = 20_000
_KEEP_BYTES = 16_000_000
_KEEP_FILES = 40
# Control characters are escaped: terminals act on them.
_ESCAPED = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


def redacted(text: str) -> str:
    """Return a log without prompts: the rest of each line after ``prompt:`` and similar words is left out."""
    return "\n".join(_SECRET.sub(rf"\1{_LEFT_OUT}", line) for line in text.splitlines())


def read(container: Container, since: float = 0.0, *, timestamps: bool = False) -> str:
    """Return the end of a container's log, unchanged: at most 20,000 lines and 16 MB.

    Args:
        container: running or stopped.
        since: only lines from this time on, in seconds since 1970; 0 for all.
        timestamps: whether each line begins with its time.

    Raises:
        docker.errors.APIError, requests.RequestException: the engine does not return the log.
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
    """Return the file to which `keep` writes a container's log."""
    return folder / f"{container.name}.container.log"


def keep(container: Container, folder: Path) -> Path | None:
    """Write the end of a container's log, without prompts, into ``folder``; keep the logs of the last 40 containers.

    Returns None if the log can't be read or written; that never fails the caller.
    """
    try:
        text = read(container, timestamps=True)
        folder.mkdir(parents=True, exist_ok=True)
        path = path_of(container, folder)
        path.write_text(redacted(text).translate(_ESCAPED) + "\n")
        kept = sorted(folder.glob("*.container.log"), key=lambda each: each.stat().st_mtime)
        for old in kept[:-_KEEP_FILES]:
            old.unlink(missing_ok=True)
    except (
        docker.errors.APIError,
        requests.RequestException,
        OSError,
    ):  # a full disk, or another process that removes logs
        return None
    return path
