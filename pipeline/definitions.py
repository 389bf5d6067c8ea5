"""What Dagster finds: the table of contents."""

from __future__ import annotations

from dagster import Definitions, in_process_executor

from pipeline import assets, automation, gates, jobs, rescan_check
from pipeline.artifacts import handles_of_run
from pipeline.events import stream
from pipeline.settings import Settings

defs = Definitions(
    assets=assets.ALL,
    asset_checks=[*gates.ALL, rescan_check.rescan],
    jobs=jobs.ALL,
    sensors=automation.SENSORS,
    schedules=automation.SCHEDULES,
    resources={"settings": Settings.read(), "io_manager": handles_of_run},
    loggers={"stream": stream},
    executor=in_process_executor,
)
