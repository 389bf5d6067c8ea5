"""JSON Lines, read in one way by everything that reads them: orchestrator and workers, planner, quantizers, evaluation.

A line ends with a newline and with nothing else (``str.splitlines`` also breaks at U+2028, which JSON allows within a
string). A byte-order mark before the first line and blank lines are allowed. Every row is checked as it is loaded, and
what is wrong is told with file and line. Standard library only: it runs in workers' environments too.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# What a row must have: key → what is wrong with a value, or None.
Shape = Mapping[str, Callable[[Any, Row], str | None]]
# One shape for all rows, or what chooses a row's.
Shapes = Shape | Callable[[Row], Shape]
_SHOWN = 60
_MARK = b"\xef\xbb\xbf"
_LETTERS = 26
_PNG, _PNG_HEAD = b"\x89PNG\r\n\x1a\n", 32  # its first bytes; the characters that hold it and the image's size
_PIXELS = 4096


class JsonLinesError(ValueError):
    """A file that is not JSON Lines of the rows that are wanted; the message names file and line."""


def read_rows(path: Path, shape: Shapes, limit: int | None = None) -> list[Row]:
    """Return the rows of a file, or the first ``limit`` of them, each checked against ``shape``.

    Raises:
        JsonLinesError: the file can't be read, or a row is not of that shape.
    """
    try:
        with path.open("rb") as lines:
            return _rows(lines, path, shape, limit)
    except OSError as error:
        raise JsonLinesError(f"can't read {path}: {error.strerror or error}") from error


def parse_rows(content: bytes, path: Path, shape: Shapes) -> list[Row]:
    """Return the rows of ``content``, which is that of ``path``; see `read_rows`.

    Raises:
        JsonLinesError: a row is not of that shape, or an ``id`` is another row's too.
    """
    return _rows(content.split(b"\n"), path, shape, None)


def _rows(lines: Iterable[bytes], path: Path, shapes: Shapes, limit: int | None) -> list[Row]:
    rows: list[Row] = []
    seen: dict[str, int] = {}
    numbered = ((number, line.removeprefix(_MARK) if number == 1 else line) for number, line in enumerate(lines, 1))
    for number, line in islice((each for each in numbered if each[1].strip()), limit):
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # of the encoding, too
            raise JsonLinesError(f"{path}, line {number}: no JSON: {error}") from error
        if problem := row_problem(row, shapes):
            raise JsonLinesError(f"{path}, line {number}: {problem}")
        if not callable(shapes) and "id" in shapes and seen.setdefault(row["id"], number) != number:
            raise JsonLinesError(f"{path}, line {number}: `id` {row['id']!r} is that of line {seen[row['id']]} too")
        rows.append(row)
    return rows


def samples(row: Row) -> Shape:
    """The shape of a calibration sample: a text, or a conversation's messages."""
    return CONVERSATIONS if isinstance(row, dict) and "messages" in row else TEXTS


def row_problem(row: Any, shapes: Shapes) -> str | None:  # noqa: ANN401 - any JSON value
    """What is wrong with a row; None if nothing is."""
    shape = shapes(row) if callable(shapes) else shapes
    expected = f"expected an object with {', '.join(f'`{key}`' for key in shape)}"
    if not isinstance(row, dict):
        return f"{expected}, found {json.dumps(row)[:_SHOWN]}"
    if missing := [key for key in shape if key not in row]:
        found = ", ".join(f"`{key}`" for key in list(row)[:8]) or "none"
        return f"`{missing[0]}` is missing: {expected}, found {found}"
    for key, check in shape.items():
        if problem := check(row[key], row):
            return f"`{key}` {problem}, found {json.dumps(row[key])[:_SHOWN]}"
    return None


def _text(value: object, _row: Row) -> str | None:
    return None if isinstance(value, str) and value else "must be a text"


def _string(value: object, _row: Row) -> str | None:
    return None if isinstance(value, str) else "must be a text"


def _choices(value: object, _row: Row) -> str | None:
    whole = isinstance(value, list) and len(value) > 1 and all(isinstance(choice, str) and choice for choice in value)
    return None if whole else "must be a list of at least two texts"


def _lettered(value: object, row: Row) -> str | None:
    return _choices(value, row) or (None if len(row["choices"]) <= _LETTERS else f"must be at most {_LETTERS} texts")


def _tools(value: object, _row: Row) -> str | None:
    whole = isinstance(value, list) and all(
        isinstance(tool, dict) and isinstance(tool.get("name"), str) and isinstance(tool.get("parameters"), dict)
        for tool in value
    )
    return None if whole and value else "must be a list of tools with `name` and `parameters`"


def _tool(value: object, row: Row) -> str | None:
    return None if value in [tool["name"] for tool in row["tools"]] else "must be the name of one of the tools"


def _object(value: object, _row: Row) -> str | None:
    return None if isinstance(value, dict) else "must be an object"


def _answer(value: object, row: Row) -> str | None:
    whole = type(value) is int and 0 <= value < len(row["choices"])
    return None if whole else "must be the place of a choice, from 0 on"


def _png(value: object, _row: Row) -> str | None:
    """Only the start is decoded: what a PNG begins with, and how large the image is."""
    try:
        head = base64.b64decode(str(value)[:_PNG_HEAD], validate=True)
    except ValueError:
        head = b""
    width, height = (int.from_bytes(head[place : place + 4], "big") for place in (16, 20))
    fits = head.startswith(_PNG) and 0 < width <= _PIXELS and 0 < height <= _PIXELS
    return None if fits else f"must be a PNG in base64, of at most {_PIXELS} pixels a side"


def _messages(value: object, _row: Row) -> str | None:
    whole = isinstance(value, list) and all(
        isinstance(each, dict) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str)
        for each in value
    )
    return None if whole and value else "must be a list of messages, each with the texts `role` and `content`"


TEXTS: Shape = {"text": _string}
CONVERSATIONS: Shape = {"messages": _messages}
DOCUMENTS: Shape = {"id": _text, "text": _text}
CHOICES: Shape = {"id": _text, "context": _string, "choices": _choices, "answer": _answer}
NAMED: Shape = {"id": _text}
IMAGES: Shape = {"id": _text, "image": _png, "question": _text, "choices": _lettered, "answer": _answer}
CALLS: Shape = {"id": _text, "prompt": _text, "tools": _tools, "name": _tool, "arguments": _object}
# By the `output_type` of a task of ours (lm-eval's word, but for what it does not ask: tool calls, images).
SHAPES: Mapping[str, Shape] = {
    "multiple_choice": CHOICES,
    "loglikelihood_rolling": DOCUMENTS,
    "generate_until": NAMED,
    "tool_calls": CALLS,
    "image_choice": IMAGES,
}
