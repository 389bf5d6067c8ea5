"""Dagster's and MLflow's own programs, with `pipeline.serving.guard` in front of what they serve.

``python -m pipeline.serving.guarded dagster dev …`` and ``… mlflow server …`` take the arguments of those programs.
Both start their web server in a process of its own; the function that starts it is replaced here. If a new version
starts it in another way, `pipeline.serving.ui` notices that the server is not guarded, and refuses to announce it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.resources import PACKAGES
from pipeline.serving.guard import Guard, origins_of

_MLFLOW_APP = "mlflow.server.fastapi_app:app"


def main() -> None:
    """Run the program that the first argument names."""
    program = sys.argv.pop(1)
    _PROGRAMS[program]()


def _dagster() -> None:
    dev, dagster = _module("dagster._cli.dev"), _module("dagster._cli")
    start = dev.open_ipc_subprocess

    def guarded(command: Sequence[str], **options: Any) -> Any:  # noqa: ANN401 - as Dagster has it
        at = command.index("-m") + 1
        if command[at] == "dagster_webserver":
            command = [*command[:at], "pipeline.serving.guarded", "dagster-webserver", *command[at + 1 :]]
        return start(command, **options)

    dev.open_ipc_subprocess = guarded
    dagster.main()


def _webserver() -> None:
    uvicorn, webserver = _module("uvicorn"), _module("dagster_webserver.cli")
    serve = uvicorn.run
    uvicorn.run = lambda app, **options: serve(Guard(app, origins_of(os.environ)), **options)
    webserver.main()


def _mlflow() -> None:
    server, mlflow = _module("mlflow.server"), _module("mlflow.cli")
    build = server._build_uvicorn_command  # noqa: SLF001 - MLflow has no public way to put something in front

    def guarded(*arguments: Any, **options: Any) -> list[str]:  # noqa: ANN401 - as MLflow has it
        command: list[str] = build(*arguments, **options)
        # uvicorn would look for the application in the current folder first.
        command += ["--app-dir", str(PACKAGES)]
        return ["pipeline.serving.guarded_mlflow:app" if part == _MLFLOW_APP else part for part in command]

    server._build_uvicorn_command = guarded  # noqa: SLF001
    mlflow.cli()


def _module(name: str) -> Any:  # noqa: ANN401 - the replaced functions have no types
    return importlib.import_module(name)


_PROGRAMS: Mapping[str, Callable[[], None]] = {
    "dagster": _dagster,
    "dagster-webserver": _webserver,
    "mlflow": _mlflow,
}

if __name__ == "__main__":
    main()
