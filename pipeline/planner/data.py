"""Checks the data files that a model's file names before any stage runs."""

from __future__ import annotations

from evals.drift import json_lines, planning
from evals.errors import SuiteError
from pipeline.errors import SpecError
from pipeline.spec import ModelSpec

# How many rows of text are checked at least; a file may have gigabytes.
_ROWS = 10_000


def check_data(spec: ModelSpec) -> None:
    """Check the data files that a model's file names, which stages would otherwise read only after an hour.

    Raises:
        SpecError: a file can't be read, a row is not valid, or there are too few; says file and line.
    """
    texts = [("load.prompts", spec.load.prompts, 1)]
    if spec.calibrates:
        texts.insert(0, ("calibration.uri", spec.calibration.uri, spec.calibration.samples))
    for key, path, wanted in texts:
        try:
            found = len(json_lines.read_rows(path, json_lines.TEXTS, max(wanted, _ROWS)))
        except json_lines.JsonLinesError as error:
            raise SpecError(f"`{key}`: {error}") from error
        if found < wanted:
            raise SpecError(f"`{key}`: {path} has {found} rows, but {wanted} are needed: add text, or lower the number")
    try:
        planning.check_data(spec.evals)
    except SuiteError as error:
        raise SpecError(str(error)) from error
