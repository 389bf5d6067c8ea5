"""JSON from outside, bounded before it is parsed: in bytes, in values and in depth.

Parsed, a JSON value takes up to a hundred times its bytes, and a validation error per value many times that. So the
values are counted first, over the raw bytes, in linear time and without building anything:

    values ≤ (commas outside of strings) + (opening brackets) + 1
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from registry.errors import RegistryError

# A string, or the beginning of one that never ends. Possessive, so that nothing is read twice.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
# Some strings with what is between them, and never a part of one: what is counted at a time.
_BLOCK = re.compile(rb'(?:[^"]++|' + _STRING.pattern + rb"){1,4096}+", re.DOTALL)
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[]{},"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


class DocumentError(RegistryError, ValueError):
    """A document from outside that is not JSON or exceeds its bounds; the message says which."""


@dataclass(frozen=True)
class Bounds:
    """What a document may have: ``bytes`` as it is stored, ``values`` of every kind in all, ``depth`` of nesting."""

    bytes: int
    values: int
    depth: int = 32


def read_json(data: bytes, bounds: Bounds, pairs_hook: Callable[[list[tuple[str, Any]]], object] | None = None) -> Any:  # noqa: ANN401 - any JSON value
    """Parse a document within ``bounds``. NaN and infinity are read as Python writes them: configurations have them.

    Args:
        data: The document.
        bounds: What it may have.
        pairs_hook: Given the pairs of each object, as `json.loads` has it.

    Raises:
        DocumentError: It is not JSON, or exceeds the bounds and was not parsed.
    """
    check_bounds(data, bounds)
    try:
        return json.loads(data.decode(), object_pairs_hook=pairs_hook)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"no JSON: {str(error)[:200]}") from error


def check_bounds(data: bytes, bounds: Bounds) -> None:
    """Check the size, the depth and the number of values of ``data``, which need not be valid JSON.

    Raises:
        DocumentError: One of them exceeds ``bounds``.
    """
    if len(data) > bounds.bytes:
        raise DocumentError(f"{len(data)} bytes, of which at most {bounds.bytes} are read")
    openings = data.count(b"[") + data.count(b"{")
    if openings <= bounds.depth and openings + data.count(b",") < bounds.values:
        return
    values, level = 1, 0
    for block in _BLOCK.finditer(data):
        structure = _STRING.sub(b"", block[0]).translate(None, _NOT_STRUCTURE)
        brackets = structure.translate(None, b",")
        opened = brackets.count(b"[") + brackets.count(b"{")
        values += len(structure) - len(brackets) + opened
        if values > bounds.values:
            raise DocumentError(f"more than {bounds.values} values, which is as many as are read")
        if max(itertools.accumulate(map(_STEP.__getitem__, brackets), initial=level)) > bounds.depth:
            raise DocumentError(f"nested more than {bounds.depth} deep, which is as deep as is read")
        level += 2 * opened - len(brackets)
