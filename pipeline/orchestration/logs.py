"""The log of runs, as JSON lines in ``logs/runs.jsonl`` of the home: with the run, and the release it is of.

dagster.yaml gives it to every run, whoever started it. What the environment calls a token, a key, a password or a
secret is taken out, should a library ever have said it, and so is the password of any address in it.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

import structlog

from pipeline.settings import Settings

_SECRET = re.compile(r"TOKEN|KEY|PASSWORD|SECRET|WEBHOOK|SMTP|CREDENTIAL")
_SHORTEST = 8  # characters; what is shorter is a path's part or a number as likely as a secret


class RunLog(logging.handlers.WatchedFileHandler):
    """Appends records to the home's file, whole lines at a time; follows it where it is rotated away."""

    def __init__(self, level: str | int = logging.INFO) -> None:
        folder = Settings.read().home / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder / "runs.jsonl", delay=True)
        self.setLevel(level)
        self.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                foreign_pre_chain=[structlog.stdlib.add_log_level, structlog.processors.TimeStamper(fmt="iso")],
                processors=[_of_run, _without_secrets(os.environ), structlog.processors.JSONRenderer()],
            )
        )


def _of_run(_logger: object, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Add what Dagster knows of the record: the run, its release and its stage."""
    meta: Mapping[str, Any] = getattr(event["_record"], "dagster_meta", {})
    tags = meta.get("job_tags") or {}
    known = {
        "run_id": meta.get("run_id"),
        "job": meta.get("job_name"),
        "release": tags.get("dagster/partition"),
        "stage": meta.get("step_key"),
        "kind": getattr(meta.get("dagster_event"), "event_type_value", None),
    }
    plain = {name: event[name] for name in ("timestamp", "level")}
    text = meta.get("orig_message") or event["event"]
    return {**plain, **{name: value for name, value in known.items() if value}, "message": text}


def _without_secrets(environment: Mapping[str, str]) -> structlog.typing.Processor:
    """Make a processor that blots out the values of variables that are secrets by their names, and passwords."""
    values = [text for name, text in environment.items() if _SECRET.search(name) and len(text) >= _SHORTEST]
    values += [text for address in environment.values() if "@" in address for text in _passwords(address)]
    found = re.compile("|".join(map(re.escape, sorted(values, key=len, reverse=True))) or r"(?!)")

    def blot(_logger: object, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {name: found.sub("***", text) if isinstance(text, str) else text for name, text in event.items()}

    return blot


def _passwords(address: str) -> Iterator[str]:
    """The password in an address, as it stands there and as it is meant; a short one only where it stands as one."""
    try:
        password = urlsplit(address).password
    except ValueError:
        return
    if password:
        yield f":{password}@"
        yield from (text for text in (password, unquote(password)) if len(text) >= _SHORTEST)
