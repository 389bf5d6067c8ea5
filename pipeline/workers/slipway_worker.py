"""The harness of every worker script: JSON request in, JSON result out, progress through Dagster Pipes.

Copied as it is into each worker's environment (see ``pipeline.workers``), so that a script needs nothing of the
checkout: ``from slipway_worker import WorkerError, main``. Depends on the standard library and ``dagster_pipes``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Report = Callable[[str], None]


class WorkerError(Exception):
    """What a person must know and can act on; shown as one line, without a traceback."""


def main(work: Callable[[Any, Report], Mapping[str, object]]) -> None:
    """Run ``work(request, report)`` for ``--request FILE --result FILE`` and exit.

    The result file holds ``{"result": …, "seconds": …, "max_rss_bytes": …}`` or ``{"error": …}`` and appears
    whole or not at all. Exit status: 0 done, 1 failed. SIGTERM and SIGINT end the process at once.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--request", type=Path, required=True, help="JSON file that says what to do")
    parser.add_argument("--result", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    # A script is named after the library that it drives: out of the way, so that `import gptqmodel` finds the library.
    folder = str(Path(sys.argv[0]).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if entry != folder]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, _frame: os._exit(128 + signum))
    started = time.monotonic()
    with _reporting() as report:
        try:
            outcome: dict[str, object] = {"result": work(json.loads(arguments.request.read_text()), report)}
        except WorkerError as error:
            outcome = {"error": str(error)}
    outcome["seconds"] = time.monotonic() - started
    outcome["max_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    beside = arguments.result.with_name(arguments.result.name + ".part")
    beside.write_text(json.dumps(outcome, allow_nan=False))
    beside.rename(arguments.result)
    if "error" in outcome:
        sys.exit(f"error: {outcome['error']}")


@contextlib.contextmanager
def _reporting() -> Iterator[Report]:
    """Give a function that reports one line of progress: to Dagster under Pipes, to stderr by hand."""
    from dagster_pipes import DAGSTER_PIPES_CONTEXT_ENV_VAR, open_dagster_pipes  # noqa: PLC0415 - the worker's own

    if DAGSTER_PIPES_CONTEXT_ENV_VAR not in os.environ:
        yield lambda line: print(line, file=sys.stderr, flush=True)
        return
    with open_dagster_pipes() as pipes:
        yield pipes.log.info
