"""What a container wrote, kept for whoever asks why it failed, with prompts left out."""

from __future__ import annotations

import re
from pathlib import Path

import docker
import requests
from docker.models.containers import Container

# Servers log a request as `prompt: '…'`, `"prompt": "…"` or a list of messages; errors quote it. What follows the word
# on its line is the user's.
_SECRET = re.compile(r"""(?ix)(["']?\b(?:prompt|messages|content|input|text)\b["']?\s*[:=]\s*)(?!None\b|null\b)\S.*$""")
_LEFT_OUT = "[left out]"
_KEEP_LINES = 20_000
_KEEP_FILES = 40


def redacted(text: str) -> str:
    """Return a log without what users wrote: the rest of a line after ``prompt:`` and its like."""
    return "\n".join(_SECRET.sub(rf"\1{_LEFT_OUT}", line) for line in text.splitlines())


def keep(container: Container, folder: Path) -> Path | None:
    """Write what a container wrote, redacted, into ``folder``; the last lines of it, of the last containers.

    None where it can't be had, or not be written: a log is no reason to fail.
    """
    try:
        text = container.logs(tail=_KEEP_LINES, timestamps=True).decode(errors="replace")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{container.name}.container.log"
        path.write_text(redacted(text) + "\n")
        kept = sorted(folder.glob("*.container.log"), key=lambda each: each.stat().st_mtime)
        for old in kept[:-_KEEP_FILES]:
            old.unlink(missing_ok=True)
    except (docker.errors.APIError, requests.RequestException, OSError):  # a full disk, or another who removes logs
        return None
    return path
