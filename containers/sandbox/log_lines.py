"""The form of vLLM's log lines: they start with the process and the level, and either may be missing."""

from __future__ import annotations

import re

PREFIX = re.compile(
    r"(?:\((?P<process>[A-Za-z][\w.-]*) pid=\d+\) ?)?"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)? \[[^\]]*\] ?)?"
)
