"""Runs where vLLM is installed: prints the options of its server, and the names of its parsers, as JSON.

`slipway lock` calls it and keeps the result beside the runtimes, so that a model file's ``serve`` is checked in its
first second, without vLLM.
"""
# ruff: noqa: INP001 - a script that runs in another environment

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
from collections.abc import Iterable
from typing import Any, TypedDict

# Where versions of vLLM have the same, the newest first.
_PARSERS = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args")
_ARGPARSE = ("vllm.utils.argparse_utils", "vllm.utils")
_TOOLS = ("vllm.tool_parsers", "vllm.entrypoints.openai.tool_parsers")


class Option(TypedDict):
    """What a long option of the server takes."""

    takes: str
    kind: str
    choices: list[str]


def main() -> None:
    """Print the document; what vLLM prints on its way is dropped."""
    with contextlib.redirect_stdout(io.StringIO()):
        parser = _first(_PARSERS).make_arg_parser(_first(_ARGPARSE).FlexibleArgumentParser())
        document = {
            "options": {name: option for action in parser._actions for name, option in _described(action)},  # noqa: SLF001
            "tool_parsers": sorted(_first(_TOOLS).ToolParserManager.list_registered()),
            "reasoning_parsers": sorted(
                importlib.import_module("vllm.reasoning").ReasoningParserManager.list_registered()
            ),
        }
    print(json.dumps(document, indent=1, sort_keys=True))


def _described(action: argparse.Action) -> Iterable[tuple[str, Option]]:
    """Each long name of an option, with what it takes."""
    takes = {"?": "at most one", "*": "any number", "+": "some", 0: "nothing", None: "one"}.get(action.nargs, "some")
    choices = [str(choice) for choice in action.choices or ()]
    kind = "choice" if choices else _kind(action.type)
    option: Option = {"takes": takes, "kind": kind, "choices": choices}
    return [(name, option) for name in action.option_strings if name.startswith("--")]


def _kind(convert: Any) -> str:  # noqa: ANN401 - what argparse calls with a word
    """What a word must be: the first kind whose example is taken, by a converter that does not take every word."""
    if convert is None or _takes(convert, "a word"):
        return "text"
    for kind, example in (("json", '{"a": 1}'), ("json", "[]"), ("float", "0.5"), ("int", "16")):
        if _takes(convert, example):
            return kind
    return "text"


def _takes(convert: Any, word: str) -> bool:  # noqa: ANN401 - as above
    try:
        convert(word)
    except Exception:  # noqa: BLE001 - whatever a converter of vLLM raises
        return False
    return True


def _first(names: Iterable[str]) -> Any:  # noqa: ANN401 - a module of vLLM
    for name in names:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise SystemExit(f"this vLLM has none of {', '.join(names)}: describe_options.py does not know it")


if __name__ == "__main__":
    main()
