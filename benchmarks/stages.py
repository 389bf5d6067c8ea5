"""Seconds a stage, and the orchestration's share: what a release took beyond its workers, servers and scanners.

    slipway release MODEL --scheme S --json | python benchmarks/stages.py

Release one scheme at a time: two at once wait for each other, and waiting is nobody's work. Worker seconds are those of
workers' processes, of image builds, of Trivy, and of the sandbox's container from its start to its end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any


def table(document: Mapping[str, Any]) -> str:
    """Return a markdown table of every release in the document that ``slipway release --json`` prints."""
    lines = ["| stage | seconds | of these, workers' own |", "|---|---|---|"]
    worked = 0.0
    for release in document["releases"]:
        for stage in release["stages"]:
            own = 0.0 if stage["cached"] else stage["worker_seconds"]
            worked += own
            how = "cached" if stage["cached"] else f"{stage['seconds']:.1f}"
            lines.append(f"| `{stage['name']}` ({release['scheme']}) | {how} | {own:.1f} |")
    rest = document["seconds"] - worked
    lines.append(f"| **all** | **{document['seconds']:.1f}** | {worked:.1f} |")
    return "\n".join([*lines, "", f"Orchestration: {rest:.1f} s, {rest / document['seconds']:.1%} of the whole."])


if __name__ == "__main__":
    print(table(json.load(sys.stdin)))
