"""What can go wrong while a model is evaluated or its answers are judged."""

from __future__ import annotations


class EvaluationError(Exception):
    """The family; its message is one line for a person and ends with what to do."""


class AnswersError(EvaluationError):
    """Answers that cannot be read, or that do not belong together."""


class SuiteError(EvaluationError):
    """An evaluation that cannot be asked: an unknown task, missing data, too few items."""
