"""The errors that are shown in one line, and which of them are transient, so that a retry may succeed."""

from __future__ import annotations

from containers.errors import ContainerError, EngineError, UnreachableRegistryError
from evals.errors import EvaluationError
from pipeline.errors import SlipwayError, UnansweredError, UnreachableError
from registry.errors import RefusedError, RegistryError, TrackingError

EXPECTED = (SlipwayError, ContainerError, EvaluationError, RegistryError)


def is_transient(error: BaseException) -> bool:
    """Whether an error comes from the network, an engine, a registry or MLflow, and not from a model, file or gate."""
    passing = UnreachableError | UnansweredError | EngineError | UnreachableRegistryError | TrackingError
    return isinstance(error, passing) and not isinstance(error, RefusedError)
