"""How a run of a release ended, in words, from its own events: the command line's last line, and what is sent round."""

from __future__ import annotations

from collections.abc import Iterable

from dagster import DagsterEvent, DagsterExecutionInterruptedError

from pipeline.orchestration.events import translate
from pipeline.orchestration.release_events import GateJudged, RunEnded, StageDone


def ending(events: Iterable[DagsterEvent], *, succeeded: bool) -> RunEnded:
    """Return how a run ended, from its events."""
    happened = list(events)
    translated = [event for event in map(translate, happened) if event]
    released = next((event.release for event in translated if isinstance(event, StageDone) and event.release), None)
    if succeeded and released:
        return RunEnded(outcome=released.outcome, release=released)
    refused = [event for event in translated if isinstance(event, GateJudged) and event.blocks]
    if refused:
        return RunEnded(outcome="refused", error="; ".join(f"{gate.name}: {gate.reason}" for gate in refused))
    return RunEnded(outcome="failed", error=_first_failure(happened))


def findings(events: Iterable[DagsterEvent]) -> list[str]:
    """What checks that stop nothing have found amiss, each in its own words."""
    judged = [
        event.asset_check_evaluation_data for event in events if event.event_type_value == "ASSET_CHECK_EVALUATION"
    ]
    return [each.description or each.check_name for each in judged if not each.passed and not each.blocking]


def _first_failure(events: Iterable[DagsterEvent]) -> str:
    for event in events:
        if event.is_step_failure:
            failure = event.step_failure_data
            if failure.user_failure_data and failure.user_failure_data.description:
                return f"{event.step_key}: {failure.user_failure_data.description}"
            if failure.error:
                cause = failure.error.cause or failure.error
                if cause.cls_name == DagsterExecutionInterruptedError.__name__:
                    return f"{event.step_key}: interrupted"
                return f"{event.step_key}: {cause.message.strip()}\n{''.join(cause.stack[-3:])}"
    return "the run failed outside of its stages; see the Dagster UI (`slipway ui`)"
