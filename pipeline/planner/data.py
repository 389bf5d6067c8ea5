"""The text files that a model's file names, looked at before the stages that read them an hour later."""

from __future__ import annotations

from evals.drift import json_lines, planning
from evals.errors import SuiteError
from pipeline.errors import SpecError
from pipeline.spec import ModelSpec

# So many rows of text at least are looked at; a file may have gigabytes.
_ROWS = 10_000


def check_data(spec: ModelSpec) -> None:
    """Read every row of the files that a model's file names, which the stages read in an hour.

    Raises:
        SpecError: a file can't be read, a row is not what it should be, or there are too few; with file and line.
    """
    for key, path, wanted in (
        ("calibration.uri", spec.calibration.uri, spec.calibration.samples),
        ("load.prompts", spec.load.prompts, 1),
    ):
        try:
            found = len(json_lines.read_rows(path, json_lines.TEXTS, max(wanted, _ROWS)))
        except json_lines.JsonLinesError as error:
            raise SpecError(f"`{key}`: {error}") from error
        if found < wanted:
            raise SpecError(f"`{key}`: {path} has {found} rows, and {wanted} are asked for: add text, or ask for fewer")
    try:
        planning.check_data(spec.evals)
    except SuiteError as error:
        raise SpecError(str(error)) from error
