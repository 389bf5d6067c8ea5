"""What is worth trying again, and what is not."""

from __future__ import annotations

import pytest

from containers.errors import EngineError, ImageError
from pipeline.errors import PlanError, SourceError, UnreachableError, WorkerFailed
from pipeline.expected_errors import is_transient
from registry.errors import PromotionError, RefusedError, TrackingError


@pytest.mark.parametrize("error", [UnreachableError("hub"), EngineError("busy"), TrackingError("MLflow")])
def test_a_network_an_engine_and_a_registry_may_be_back_in_a_moment(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [SourceError("gone"), PlanError("too large"), WorkerFailed("out of memory"), ImageError("no base"),
     RefusedError("who are you?"), PromotionError("a gate blocks"), ZeroDivisionError()],
)  # fmt: skip
def test_what_would_go_the_same_way_again_is_not_tried_again(error: Exception) -> None:
    assert not is_transient(error)
