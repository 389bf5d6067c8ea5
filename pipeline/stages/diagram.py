"""The graph of the stages as Mermaid text, for the documentation: ``python -m pipeline.stages.diagram``."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.stages.stage import Stage
from pipeline.stages.table import STAGES


def mermaid(stages: Sequence[Stage] = STAGES) -> str:
    """Return the graph: solid arrows carry artifacts, dotted ones only order, and gated stages are hexagons."""
    lines = ["flowchart LR"]
    lines += [f"    {stage.name}{{{{{stage.name} and its gate}}}}" for stage in stages if stage.gate]
    for stage in stages:
        lines += [f"    {name} --> {stage.name}" for name in stage.inputs]
        lines += [f"    {name} -.-> {stage.name}" for name in stage.waits_for if name not in stage.inputs]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(mermaid(), end="")
