"""Requests that a model answers by calling a tool; imported by the worker, which asks them through a server's chat API.

A call is right if it is the only one, of the expected tool, with arguments that fit the tool's JSON schema and have the
expected values; texts are compared without case and surrounding space.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evals.drift.items import ItemAnswer

Row = Mapping[str, Any]
Chat = Callable[[dict[str, Any]], dict[str, Any]]

TYPE = "tool_calls"
_TOKENS = 256
_QUESTION, _SAID = 500, 200  # characters that are kept for a person to read


def answer(row: Row, chat: Chat) -> ItemAnswer:
    """Ask a row and return its answer, as `evals.drift.answers.GeneratedAnswer` has it.

    ``chat`` sends a body to ``/v1/chat/completions`` and returns the reply.
    """
    body = request(row)
    reply = chat(body)
    message = reply["choices"][0]["message"]
    calls = message.get("tool_calls") or []
    problem = wrong(row, calls)
    said = [f"{call['function'].get('name')}({call['function'].get('arguments')})" for call in calls]
    text = "; ".join(said) or str(message.get("content") or "")
    return {
        "id": row["id"],
        "asked": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16],
        "group": "",
        "question": row["prompt"][-_QUESTION:],
        "right": problem is None,
        "tokens": int((reply.get("usage") or {}).get("completion_tokens") or 0),
        "said": (text if problem is None else f"{text} ({problem})")[:_SAID],
    }


def request(row: Row) -> dict[str, Any]:
    """Return the request body of a row: greedy, and the model may call a tool or not."""
    return {
        "messages": [{"role": "user", "content": row["prompt"]}],
        "tools": [{"type": "function", "function": tool} for tool in row["tools"]],
        "tool_choice": "auto",
        "temperature": 0,
        "seed": 1234,
        "max_tokens": _TOKENS,
    }


def wrong(row: Row, calls: Sequence[Mapping[str, Any]]) -> str | None:
    """Say what is wrong with a reply's calls; None where they are right."""
    if len(calls) != 1:
        return f"{len(calls)} calls"
    function = calls[0].get("function") or {}
    name, given = function.get("name"), str(function.get("arguments"))
    if name != row["name"]:
        return f"calls {name!r}"
    try:
        arguments = json.loads(given)
    except (ValueError, RecursionError):
        return "the arguments are not JSON"
    schema = next(tool["parameters"] for tool in row["tools"] if tool["name"] == name)
    return _misfit(arguments, schema) or _other_value(arguments, row["arguments"])


def _misfit(arguments: Any, schema: Mapping[str, Any]) -> str | None:  # noqa: ANN401 - JSON
    import jsonschema

    error = next(iter(jsonschema.Draft202012Validator(schema).iter_errors(arguments)), None)
    return None if error is None else f"the arguments do not fit the schema: {error.message}"


def _other_value(arguments: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    for key, value in expected.items():
        if _plain(arguments.get(key)) != _plain(value):
            return f"`{key}` is {arguments.get(key)!r}"
    return None


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON
    return value.strip().casefold() if isinstance(value, str) else value
