from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import bounded_json
from registry.bounded_json import Bounds, DocumentError, read_json

BOUNDS = Bounds(bytes=1 << 20, values=1000, depth=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@given(VALUES)
def test_reads_what_json_reads_and_measures_its_depth(value: object) -> None:
    data = json.dumps(value).encode()
    generous = Bounds(bytes=len(data), values=10**6, depth=max(1, depth(value)))
    assert read_json(data, generous) == value
    if depth(value) > 1:
        with pytest.raises(DocumentError, match="nested more than"):
            read_json(data, Bounds(bytes=len(data), values=10**6, depth=depth(value) - 1))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"[" * 9 + b"]" * 9, "nested more than 8 deep"),
        (b"[" * 500_000, "values"),
        (b'{"a":' * 9 + b"1" + b"}" * 9, "nested more than 8 deep"),
        (b"[" + b"1," * 1000 + b"1]", "more than 1000 values"),
        (b" " * (1 << 21), "bytes"),
        (b"[1e5", "no JSON"),
        (b'"\xff"', "no JSON"),
        (b"9" * 5000, "no JSON"),
        (b"\xff\xfe[\x00", "no JSON"),
    ],
)
def test_refuses_with_its_own_error(data: bytes, problem: str) -> None:
    with pytest.raises(DocumentError, match=problem):
        read_json(data, BOUNDS)


def test_brackets_and_commas_in_strings_do_not_count() -> None:
    text = '[{,"\\' * 1000
    assert read_json(json.dumps([text] * 8).encode(), BOUNDS) == [text] * 8


def test_refuses_without_building_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(bounded_json.json, "loads", never)
    data = b"[" + b"[]," * 300_000 + b"[]]"
    tracemalloc.start()
    with pytest.raises(DocumentError, match="values"):
        read_json(data, BOUNDS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(data)


def test_a_string_that_never_ends_is_read_once() -> None:
    # Read again from each of its escaped quotes, it would take hours.
    with pytest.raises(DocumentError, match="no JSON"):
        read_json(b"[" * 9 + b'\\"' * 500_000, Bounds(bytes=1 << 21, values=1000, depth=9))
