"""The built-in data: whole, and no evaluation item in what the quantizer is calibrated with."""

from __future__ import annotations

import json
import re

from evals import builtin
from evals.drift import json_lines
from evals.drift.overlap import pooled, runs
from registry.digests import digest_file


def test_the_files_are_those_that_the_script_made() -> None:
    digests = json.loads((builtin.FILES["cloze"].parent / "digests.json").read_text())
    assert {path.name: digest_file(path) for path in builtin.FILES.values()} == digests


def test_no_evaluation_item_shares_a_run_of_words_with_the_calibration_text() -> None:
    calibration = json_lines.read_rows(builtin.FILES["calibration"], json_lines.TEXTS)
    known = pooled(row["text"] for row in calibration)
    heldout = json_lines.read_rows(builtin.FILES["heldout"], json_lines.TEXTS)
    cloze = json_lines.read_rows(builtin.FILES["cloze"], json_lines.CHOICES)
    shown = [row["text"] for row in heldout] + [
        f"{row['context']} {choice}" for row in cloze for choice in row["choices"]
    ]
    assert not known & set().union(*map(runs, shown))


def test_every_choice_of_an_item_holds_the_same_words() -> None:
    for row in json_lines.read_rows(builtin.FILES["cloze"], json_lines.CHOICES):
        assert len({tuple(sorted(re.findall("[A-Za-z]+", choice))) for choice in row["choices"]}) == 1, row["id"]
        assert len(set(row["choices"])) == 4
