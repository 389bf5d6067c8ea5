"""How a run of a release ended, in words, from its own events: the command line's last line, and what is sent round."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dagster import DagsterEvent, DagsterExecutionInterruptedError

from pipeline.orchestration.events import translate


def ending(events: Iterable[DagsterEvent], *, succeeded: bool) -> dict[str, Any]:
    """Return ``outcome`` (promoted, up-to-date, refused or failed), ``error`` and, where there is one, ``release``."""
    happened = list(events)
    translated = [event for event in map(translate, happened) if event]
    released = next((event["release"] for event in translated if "release" in event), None)
    if succeeded and released:
        return {"outcome": released["outcome"], "release": released, "error": None}
    refused = [event for event in translated if event["event"] == "gate" and event["blocks"]]
    if refused:
        error = "; ".join(f"{gate['gate']}: {gate['reason']}" for gate in refused)
        return {"outcome": "refused", "release": None, "error": error}
    return {"outcome": "failed", "release": None, "error": _first_failure(happened)}


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
