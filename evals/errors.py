"""What can go wrong while a model is evaluated or its answers are judged."""

from __future__ import annotations

from typing import Self

from pydantic import ValidationError

from registry.errors import first_problem


class EvaluationError(Exception):
    """The family; its message is one line for a person and ends with what to do."""


class AnswersError(EvaluationError):
    """Answers that cannot be read, or that do not belong together."""


class SuiteError(EvaluationError):
    """An evaluation that cannot be asked: an unknown task, missing data, too few items."""


class LoadEvidenceError(EvaluationError):
    """A load test's evidence that can't be read, or does not have the expected form."""

    @classmethod
    def of(cls, error: ValidationError, where: str) -> Self:
        """The first problem of a document that does not have the expected form."""
        return cls(f"{where}: {first_problem(error)}: run the load test again")
