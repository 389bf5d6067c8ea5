"""`slipway ui` as a user starts it, asked through GraphQL as the browser asks; and what of it still runs."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx

from homes import SLIPWAY, Slipway

REPOSITORY = {"repositoryLocationName": "pipeline.definitions", "repositoryName": "__repository__"}
STATUS = "query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
RUNS = "{ runsOrError { ... on Runs { results { runId jobName status tags { key value } } } } }"
# What the dialog of "Materialize all" sends for one partition.
LAUNCH = """mutation($params: ExecutionParams!) { launchRun(executionParams: $params) { __typename
    ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
TERMINATE = "mutation($id: String!) { terminateRun(runId: $id) { __typename } }"


# For what ends by itself: a run may wait for the device while another worker's release has it.
PATIENCE_SECONDS = 900


class Ui:
    """The servers, started as a user starts them."""

    def __init__(self, slipway: Slipway) -> None:
        self.port = two_free_ports()
        self.log = slipway.home / "ui.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [SLIPWAY, "ui", "--port", str(self.port)],
                env=dict(slipway.variables),
                stderr=log,
                start_new_session=True,
            )

    def announced(self) -> str:
        """What it says until the servers are announced."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while "Ctrl-C" not in (told := self.log.read_text()):
            assert self.process.poll() is None, told
            assert time.monotonic() < deadline, told
            time.sleep(0.2)
        return told

    def __call__(self, query: str, **variables: object) -> dict[str, Any]:
        body = {"query": query, "variables": variables}
        reply = httpx.post(f"http://127.0.0.1:{self.port}/graphql", json=body, timeout=60, trust_env=False)
        document = reply.json()
        assert not document.get("errors"), document
        answer: dict[str, Any] = document["data"]
        return answer

    def launch(self, scheme: str) -> str:
        selector = {**REPOSITORY, "pipelineName": "release_model"}
        keys = {"": f"demo|{scheme}", "/model": "demo", "/scheme": scheme}
        metadata = {"tags": [{"key": f"dagster/partition{name}", "value": key} for name, key in keys.items()]}
        params = {"selector": selector, "runConfigData": "{}", "mode": "default", "executionMetadata": metadata}
        launched = self(LAUNCH, params=params)["launchRun"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        run_id: str = launched["run"]["runId"]
        return run_id

    def status(self, run_id: str) -> str:
        status: str = self(STATUS, id=run_id)["runOrError"]["status"]
        return status

    def wait(self, run_id: str, *wanted: str, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        while (status := self.status(run_id)) not in {*wanted, "SUCCESS", "FAILURE", "CANCELED"}:
            assert time.monotonic() < deadline, f"still {status} after {seconds} s"
            time.sleep(0.5)
        return status

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


def two_free_ports() -> int:
    """A port that is free, as is the next; not of those that the kernel gives to connections, for it is used later."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def processes_of(home: Path) -> dict[int, str]:
    """The command of every process whose environment names this home: servers, runs, their children."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"SLIPWAY_HOME={home}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue  # it ended, or is another user's
    return found


def workers_of(home: Path) -> dict[int, str]:
    """The command of every worker of this home: they work in its folder of what is being made."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if "--request" in command and str(home) in command:
            found[int(entry.name)] = command
    return found
