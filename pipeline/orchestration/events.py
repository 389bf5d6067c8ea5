"""A run's events for the command line: one JSON object a line, made from Dagster's own event log."""

from __future__ import annotations

import logging
import sys

from dagster import DagsterEvent, InitLoggerContext, logger

from pipeline.orchestration.release_events import GateJudged, RunEvent, StageDone, StageProgress, StageStarted
from pipeline.stages.metadata import CACHED, RELEASE, SECONDS, SIZE, VERDICT, WORKER_SECONDS
from pipeline.stages.table import BY_NAME


@logger
def stream(_context: InitLoggerContext) -> logging.Logger:
    """Write the records of a run that the command line shows to stdout, each as one JSON line."""
    made = logging.Logger("slipway.stream", level=logging.DEBUG)  # noqa: LOG001 - not shared, so not in the registry
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Line())
    handler.addFilter(lambda record: _event(record) is not None)
    made.addHandler(handler)
    return made


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event = _event(record)
        return "" if event is None else event.model_dump_json()


def _event(record: logging.LogRecord) -> RunEvent | None:
    """Translate one log record; None where the command line does not show it."""
    meta = getattr(record, "dagster_meta", {})
    step = meta.get("step_key")
    event = meta.get("dagster_event")
    if event is None:
        text = meta.get("orig_message", record.getMessage())
        shown = step in BY_NAME and record.levelno == logging.INFO and not text.startswith("[pipes]")
        return StageProgress(stage=step, text=text) if shown else None
    return translate(event)


def translate(event: DagsterEvent) -> RunEvent | None:
    """Translate a Dagster event: a stage that starts or is done, a gate that decided."""
    if event.is_step_start and event.step_key in BY_NAME:
        return StageStarted(stage=event.step_key)
    if event.is_step_materialization and event.asset_key:
        metadata = event.materialization.metadata
        names = (SECONDS, CACHED, WORKER_SECONDS, SIZE, RELEASE)
        told = {name: metadata[name].value for name in names if name in metadata}
        return StageDone.model_validate({"name": event.asset_key.path[-1], **told})
    if event.event_type_value == "ASSET_CHECK_EVALUATION":
        judged = event.asset_check_evaluation_data.metadata.get(VERDICT)
        return GateJudged.model_validate(judged.value) if judged else None
    return None
