"""One release as one Dagster run in this process: ``python -m pipeline.orchestration.run MODEL_FILE SCHEME``.

The command line starts one such process a scheme. It imports what it needs and waits for a line on stdin, while the
command line checks whether the run is needed and possible. Events go to stdout as JSON lines (see
``pipeline.orchestration.events``); the last says how it ended. The run is recorded in the same instance as the UI's,
and shows there.
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # what is imported is no garbage, and looking for some takes a seventh of the imports' time

import sys
import uuid
from pathlib import Path

from dagster import MultiPartitionKey

import pipeline.orchestration.instance_storage  # noqa: F401 - which Dagster would import when the run has begun
from pipeline.definitions import defs
from pipeline.errors import SlipwayError
from pipeline.orchestration.instance import alive, fail_orphaned_runs, open_instance
from pipeline.orchestration.jobs import RELEASE_JOB
from pipeline.orchestration.partitions import MODEL_FILE_TAG, add_partitions
from pipeline.orchestration.release import GO
from pipeline.orchestration.release_events import RunEnded
from pipeline.orchestration.run_outcome import ending
from pipeline.settings import Settings
from pipeline.spec import load


def release(model_file: Path, scheme: str, settings: Settings) -> RunEnded:
    """Run every stage of one release and return how that ended."""
    spec = load(model_file)
    spec.scheme(scheme)
    run_id = str(uuid.uuid4())
    with open_instance(settings) as instance, alive(run_id, settings):
        fail_orphaned_runs(instance, settings)
        add_partitions(instance, spec)
        result = defs.resolve_job_def(RELEASE_JOB).execute_in_process(
            run_config={"loggers": {"stream": {}}},
            instance=instance,
            partition_key=MultiPartitionKey({"model": spec.model, "scheme": scheme}),
            raise_on_error=False,
            run_id=run_id,
            tags={MODEL_FILE_TAG: str(model_file)},
        )
    return ending(result.all_events, succeeded=result.success)


def main() -> None:
    """Wait for the word to begin, run one release, and print how it ended."""
    model_file, scheme = sys.argv[1:]
    gc.freeze()  # nor is it any later: looking through it takes most of a second when this ends
    gc.enable()
    if sys.stdin.readline().strip() != GO:
        return
    try:
        ended = release(Path(model_file), scheme, Settings.read())
    except SlipwayError as error:
        ended = RunEnded(outcome="failed", error=str(error))
    print(ended.model_dump_json(), flush=True)


if __name__ == "__main__":
    main()
