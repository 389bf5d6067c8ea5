"""YAML that is an attack, or a slip: one line with its place, never a traceback, whatever the file holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import yaml_file
from pipeline.errors import SpecError
from pipeline.spec import load

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (BOMB, "line 5: its aliases repeat too much"),
        (BOMB.replace("[", "{k: [").replace("]", "]}"), "aliases repeat|expected|while"),
        ("".join(f"? {{a{n}: 1}}\n: 2\n" for n in range(10)), "line 1: a key is a word here"),
        ("a: &a [*a]", "line 1: its aliases repeat too much"),
        ("a: &a {b: *a}", "line 1: its aliases repeat too much"),
        ("a: &a\n  <<: *a\n", "its aliases repeat too much"),
        ("a: " + "[" * 100 + "]" * 100, "line 1: nested too deeply"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("- " * 3000, "nested too deeply"),
        ("a: [" + "1, " * 30_000 + "1]", "at most 20000 values"),
        ("a: " + "x" * 300_000, "at most 256 KiB"),
        ("expires: 2026-11-31", "line 1: '2026-11-31' can't be read: day is out of range for month"),
        ("a: 1\nwhen: !!timestamp soon", "line 2: 'soon' can't be read"),
        ("a: !!int many", "line 1: 'many' can't be read"),
        ("a: !!bool 3", "line 1: '3' can't be read"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: 1\na: 2", "line 2: the key `a` stands twice"),
        ("a: " + "9" * 5000, "can't be read"),
        ("a: \x00", "not valid YAML"),
    ],
    ids=lambda value: value[:30],
)
def test_is_refused_in_one_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=problem) as caught:
        yaml_file.read(path)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_anchors_that_a_person_writes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("common: &common {bits: 4}\nawq: {<<: *common, method: awq}\ngptq: *common\n")
    assert yaml_file.read(path)["awq"] == {"bits": 4, "method": "awq"}


def test_a_wrong_value_is_shown_in_short(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("model: [" + "x, " * 10_000 + "x]\n")
    with pytest.raises(SpecError) as caught:
        load(path)
    assert len(str(caught.value)) < 2000


def test_a_key_of_halves_of_a_character_is_a_problem_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text('"\\ud800\\udc00": 1\n')
    with pytest.raises(SpecError, match="is not a valid model file"):
        load(path)


@pytest.mark.parametrize(
    "line",
    [
        f"load: [{'a' * 5000}]",
        f"source: {{uri: 'file:{'9' * 5000}'}}",
        'scan: {fail_on: ["\\ud800"]}',
        "load: [../quick]",
    ],
    ids=lambda line: line[:12],
)
def test_a_name_that_no_file_can_have_is_a_problem_of_the_file(tmp_path: Path, line: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(f"{line}\n")
    with pytest.raises(SpecError, match="is not a valid model file"):
        load(path)
