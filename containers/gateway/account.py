"""The record of one request for the log and the metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from containers.gateway.trace import Trace


@dataclass
class Account:
    """What the log and the metrics record about a request. Prompt and answer are never part of it."""

    trace: Trace
    path: str
    started: float = field(default_factory=time.monotonic)
    key: str = "-"
    model: str = "-"
    replica: str = "-"
    release: str = "-"
    status: int = 0
    code: str = "ok"
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    queued_s: float = 0.0
    overhead_s: float = 0.0
    first_s: float | None = None
