"""What Dagster finds: the table of contents."""

from __future__ import annotations

from dagster import Definitions, in_process_executor

from pipeline.orchestration import assets, automation, checks, jobs, rescan_check
from pipeline.orchestration.events import stream
from pipeline.orchestration.io_manager import handles_of_run
from pipeline.settings import Settings

defs = Definitions(
    assets=assets.ALL,
    asset_checks=[*checks.ALL, rescan_check.rescan],
    jobs=jobs.ALL,
    sensors=automation.SENSORS,
    schedules=automation.SCHEDULES,
    resources={"settings": Settings.read(), "io_manager": handles_of_run},
    loggers={"stream": stream},
    executor=in_process_executor,
)
