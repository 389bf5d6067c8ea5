"""Checks the data files that a model's file names before any stage runs."""

from __future__ import annotations

from evals.drift import json_lines, planning
from evals.errors import SuiteError
from pipeline.errors import QuantizeError, SpecError
from pipeline.quantization import calibration_data
from pipeline.spec import ModelSpec

# How many rows of text are checked at least; a file may have gigabytes.
_ROWS = 10_000


def check_data(spec: ModelSpec) -> bool:
    """Check the data files that a model's file names, which stages would otherwise read only after an hour.

    Return whether the calibration holds conversations, which need a chat template.

    Raises:
        SpecError: a file can't be read, a row is not valid, or there are too few; says file and line.
    """
    samples: list[calibration_data.Sample] = []
    try:
        data = spec.calibration.data
        if spec.calibrates and all(each.is_here for each in data):
            samples = calibration_data.draw(spec.calibration, [[each.path] for each in data])
        if not json_lines.read_rows(spec.load.prompts, json_lines.TEXTS, _ROWS):
            raise SpecError(f"`load.prompts`: {spec.load.prompts} has no rows: add text")
        planning.check_data(spec.evals)
    except json_lines.JsonLinesError as error:
        raise SpecError(f"`load.prompts`: {error}") from error
    except (QuantizeError, SuiteError) as error:
        raise SpecError(str(error)) from error
    return calibration_data.holds_conversations(samples)
