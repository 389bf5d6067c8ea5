"""What is tried again, and what is not."""

from collections.abc import Callable
from itertools import pairwise

import pytest
from dagster import DagsterEvent, DagsterExecutionInterruptedError, OpExecutionContext, job, op

from containers.errors import EngineError
from pipeline.errors import SpecError
from pipeline.orchestration.retries import fail

ENDINGS = {"STEP_UP_FOR_RETRY", "STEP_FAILURE", "STEP_SUCCESS"}


def endings(fails: Callable[[OpExecutionContext], None]) -> list[DagsterEvent]:
    """How each try of a step ends that fails so."""

    @op
    def step(context: OpExecutionContext) -> None:
        fails(context)

    @job
    def only() -> None:
        step()

    events = only.execute_in_process(raise_on_error=False).all_events
    return [event for event in events if event.event_type_value in ENDINGS]


def test_a_wrong_file_and_an_interrupt_are_not_tried_again() -> None:
    def misspelt(context: OpExecutionContext) -> None:
        fail(context, SpecError("a misspelt key"))

    def interrupted(_: OpExecutionContext) -> None:
        raise DagsterExecutionInterruptedError

    assert [event.event_type_value for event in endings(misspelt)] == ["STEP_FAILURE"]
    assert [event.event_type_value for event in endings(interrupted)] == ["STEP_FAILURE"]


def test_an_engine_that_stays_away_is_asked_three_times_and_named_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.orchestration.retries._FIRST_WAIT_SECONDS", 0.05)

    def away(context: OpExecutionContext) -> None:
        fail(context, EngineError("no engine answers"))

    *again, last = endings(away)
    assert [event.event_type_value for event in again] == ["STEP_UP_FOR_RETRY"] * 2
    waits = [event.step_retry_data.seconds_to_wait or 0 for event in again]
    assert all(later == 2 * sooner for sooner, later in pairwise(waits))
    failure = last.step_failure_data.user_failure_data
    assert failure is not None
    assert failure.description == "no engine answers"
