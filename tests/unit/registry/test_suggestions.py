from __future__ import annotations

import pytest

from registry.suggestions import suggestion


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("champoin", ["candidate", "champion"], ": did you mean `champion`?"),
        ("h20o", ["A100", "H200"], ": did you mean `H200`?"),
        ("zzz", ["candidate", "champion"], ": there are `candidate`, `champion`"),
        ("zzz", [], ": there are none yet"),
        ("zzz", [f"name{number}" for number in range(100)], ""),
    ],
)
def test_the_nearest_name_or_else_a_short_list(name: str, known: list[str], expected: str) -> None:
    assert suggestion(name, known) == expected
