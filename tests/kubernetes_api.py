"""A stand-in for Kubernetes' API: takes jobs that its published schemas take, and runs them as processes here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate

from checkout import CHECKOUT

NAMESPACE, TOKEN = "models", "a-token"
_JOBS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
_PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"


@dataclass
class Api:
    """``jobs`` are the manifests that were taken, by name; what is deleted goes from ``processes`` alone.

    The next ``busy`` requests are sent away for a second; as long as it is ``lost``, what is asked is done unanswered.
    The next ``forbidden`` looks at a job are answered as by a server that has not read its roles yet. ``pod`` is added
    to a pod's status, ``events`` are what its warnings say; where there is ``no_log``, its node is gone. ``disrupted``
    are pods that the cluster ends by itself: their jobs start new ones where their policies say so, as Kubernetes' job
    controller does; ``attempts`` counts a job's pods. ``asked`` is every request, ``connections`` how many there were.
    """

    address: str
    folder: Path
    variables: Mapping[str, str]
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    busy: int = 0
    lost: bool = False
    forbidden: int = 0
    pod: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, str]] = field(default_factory=list)
    no_log: bool = False
    disrupted: set[str] = field(default_factory=set)
    attempts: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    connections: set[int] = field(default_factory=set)

    def start(self, manifest: dict[str, Any]) -> None:
        kubernetes_validate.validate(manifest, "1.37", strict=True)
        name = manifest["metadata"]["name"]
        self.jobs[name] = manifest
        self._start_pod(name)

    def _start_pod(self, name: str) -> None:
        (container,) = self.jobs[name]["spec"]["template"]["spec"]["containers"]
        python, *arguments = container["command"]
        assert python == "python"
        environment = {each["name"]: each["value"] for each in container["env"]} | dict(self.variables)
        self.attempts[name] = self.attempts.get(name, 0) + 1
        with (self.folder / self.pod_of(name)).open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *arguments], cwd=CHECKOUT, env=environment, stdout=log, stderr=log
            )

    def pod_of(self, name: str) -> str:
        """The name of a job's newest pod."""
        return f"{name}-x2b{self.attempts[name]}"

    def disrupt(self, name: str) -> None:
        """End a job's pod as a drain of its node does; the pod is gone until its replacement runs."""
        self.disrupted.add(name)
        self.processes[name].terminate()
        self.processes[name].wait(30)

    def stop(self, name: str) -> None:
        process = self.processes.pop(name)
        process.terminate()
        process.wait(30)

    def condition(self, name: str) -> list[dict[str, str]]:
        status = self.processes[name].poll()
        if status and name in self.disrupted and self._is_replaced(name):
            self.disrupted.remove(name)
            self._start_pod(name)
            status = None
        if status is None:
            return []
        reason = {} if status == 0 else {"reason": "BackoffLimitExceeded", "message": "Job has reached the limit"}
        return [{"type": "Failed" if status else "Complete", "status": "True", **reason}]

    def _is_replaced(self, name: str) -> bool:
        """Whether a job's policy ignores pods that the cluster ended."""
        rules = self.jobs[name]["spec"].get("podFailurePolicy", {}).get("rules", [])
        disrupted = {"type": "DisruptionTarget", "status": "True"}
        return any(rule["action"] == "Ignore" and disrupted in rule.get("onPodConditions", []) for rule in rules)


@contextmanager
def kubernetes_api(folder: Path, variables: Mapping[str, str]) -> Iterator[Api]:
    """Start it on loopback; ``variables`` are what a pod has of its secrets and volumes."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        python = {"PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT)}
        api = Api(f"http://127.0.0.1:{server.server_port}", folder, {**python, **variables})
        server.api = api  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield api
        finally:
            server.shutdown()
            thread.join()
            for name in list(api.processes):
                api.stop(name)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        api, url = self._api(), urlsplit(self.path)
        api.asked.append(self.path)
        api.connections.add(self.client_address[1])
        if self._is_busy():
            return
        if api.forbidden and api.processes:
            api.forbidden -= 1
            words = f'jobs.batch is forbidden: User "slipway" cannot get resource "jobs" in the namespace "{NAMESPACE}"'
            status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": words}
            self._reply({**status, "reason": "Forbidden", "details": {"kind": "jobs"}, "code": 403}, 403)
            return
        if url.path.startswith(f"{_JOBS}/") and (name := url.path.rsplit("/", 1)[1]) in api.processes:
            self._reply({**api.jobs[name], "status": {"conditions": api.condition(name)}})
        elif url.path == _PODS:
            name = parse_qs(url.query)["labelSelector"][0].removeprefix("job-name=")
            there = name in api.processes and name not in api.disrupted
            self._reply({"items": [self._pod(name)] if there else []})
        elif url.path.endswith("/events"):
            self._reply({"items": api.events})
        elif url.path.endswith("/log") and api.no_log:
            self._reply({"kind": "Status", "message": "dial tcp 10.0.0.7:10250: no route to host", "code": 400}, 400)
        elif found := re.fullmatch(rf"{_PODS}/(.+)/log", url.path):
            self._reply((api.folder / found[1]).read_bytes())
        else:
            self._reply({"message": "not found"}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._is_busy():
            return
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._reply({"message": "Unauthorized"}, 401)
            return
        try:
            self._api().start(body)
        except kubernetes_validate.ValidationError as error:
            self._reply({"message": str(error)}, 422)
        else:
            self._reply(body, 201)

    def do_DELETE(self) -> None:
        name = urlsplit(self.path).path.rsplit("/", 1)[1]
        if name not in self._api().processes:
            self._reply({"message": "not found"}, 404)
            return
        self._api().stop(name)
        self._reply({})

    def _pod(self, name: str) -> dict[str, Any]:
        api = self._api()
        return {"metadata": {"name": api.pod_of(name)}, "status": {"phase": "Running", **api.pod}}

    def _is_busy(self) -> bool:
        api = self._api()
        if busy := api.busy > 0:
            api.busy -= 1
            self._reply({"message": "too many requests"}, 429)
        return busy

    def log_message(self, *_: object) -> None:
        pass

    def _api(self) -> Api:
        api: Api = self.server.api  # type: ignore[attr-defined]
        return api

    def _reply(self, content: dict[str, Any] | bytes, status: int = 200) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        if self._api().lost:
            status = 504
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "1")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
