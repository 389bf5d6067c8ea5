"""The errors that are told in one line, and which of them may pass if the same is tried again a little later."""

from __future__ import annotations

from containers.errors import ContainerError, EngineError, UnreachableRegistryError
from evals.errors import EvaluationError
from pipeline.errors import SlipwayError, UnansweredError, UnreachableError
from registry.errors import RefusedError, RegistryError, TrackingError

EXPECTED = (SlipwayError, ContainerError, EvaluationError, RegistryError)


def is_transient(error: BaseException) -> bool:
    """Whether it is of the network, an engine, a registry or MLflow: what a verdict, a model or a file never is."""
    passing = UnreachableError | UnansweredError | EngineError | UnreachableRegistryError | TrackingError
    return isinstance(error, passing) and not isinstance(error, RefusedError)
