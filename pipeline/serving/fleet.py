"""The replicas of one release: hardened containers of its image, each kept alive by a thread of its own."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import httpx
import requests

from containers.engine.engine import connect
from containers.errors import ContainerError
from containers.hardware.core_pool import CoreRequest
from containers.hardware.gpu import gpus
from containers.sandbox import sandbox
from evals.load.evidence import read_load_evidence
from pipeline.errors import SlipwayError
from pipeline.settings import Settings
from registry.manifest import EVIDENCE, Manifest
from registry.progress import Progress

REPLICA_LABEL = "slipway.replica"
_POLL_SECONDS = 0.5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
# A replica may take this many times as long to start as in the load test, and at least ten minutes.
_STARTS, _LEAST_START_TIMEOUT_S = 4, 600.0
_WARM_REQUESTS, _WARM_TOKENS = 2, 8
_WARM_SECONDS = 120.0


class FleetError(SlipwayError):
    """A release can't be served: its image is absent, or its replicas don't get well."""


@dataclass(frozen=True)
class Resources:
    """What a replica gets: what its release was load-tested with."""

    memory_bytes: int
    cpus: float | None
    start_timeout_s: float

    @classmethod
    def tested(cls, folder: Path) -> Resources:
        """Read the resources from a pulled release's load test.

        Raises:
            LoadEvidenceError: its evidence can't be read.
        """
        evidence = read_load_evidence(folder / EVIDENCE)
        timeout = max(_LEAST_START_TIMEOUT_S, _STARTS * (evidence.server.start_seconds or 0.0))
        return cls(evidence.memory.limit_bytes, evidence.server.cpus, timeout)


class Fleet:
    """``count`` replicas of one release. `start`, then `wait_ready`; `stop` at the end, however it went.

    ``of_all`` is how many replicas of all releases are served beside each other: so many share the machine's cores.
    ``changed`` is called, from any thread, whenever a replica came or went.
    """

    def __init__(
        self,
        settings: Settings,
        release: str,
        manifest: Manifest,
        folder: Path,
        count: int,
        of_all: int,
        changed: Callable[[], None],
        progress: Progress,
    ) -> None:
        self.release = release
        self.digest = manifest.digest
        self.folder = folder
        self.served_as, self.context = "", 0
        self._settings = settings
        self._changed = changed
        self._progress = progress
        self._resources = Resources.tested(folder)
        self._of_all = of_all
        self._needs_gpu = manifest.image.minimum_driver is not None
        self._image = manifest.image
        self._replicas = [_Replica(self, index) for index in range(count)]

    def start(self) -> None:
        """Begin to start all replicas.

        Raises:
            FleetError: The engine has not this image and can't pull it, or does not answer.
        """
        try:
            with contextlib.closing(self.engine()) as client:
                self.image_id = _image(client, self._image.reference, self._image.digest)
        except (docker.errors.DockerException, requests.RequestException) as error:
            raise FleetError(f"the engine does not answer: {error}") from error
        for replica in self._replicas:
            replica.start()

    def grow(self, count: int) -> bool:
        """Begin to start more replicas, up to ``count``, and say whether any are; what runs stays."""
        before = len(self._replicas)
        for index in range(before, count):
            replica = _Replica(self, index)
            self._replicas.append(replica)
            replica.start()
        return count > before

    def wait_ready(self, check: Callable[[], None]) -> None:
        """Wait until every replica is well and warm; ``check`` may raise meanwhile.

        Raises:
            FleetError: One failed to start.
        """
        while not all(replica.url for replica in self._replicas):
            for replica in self._replicas:
                if replica.failure is not None:
                    raise FleetError(f"{replica.name} does not get well: {replica.failure}")
            check()
            threading.Event().wait(_POLL_SECONDS / 2)

    def up(self) -> dict[str, str]:
        """The replicas that are well: URLs by name."""
        return {replica.name: replica.url for replica in self._replicas if replica.url}

    def names(self) -> set[str]:
        """Every replica's name, well or not."""
        return {replica.name for replica in self._replicas}

    def stop(self) -> None:
        """End and remove all replicas, those that are still starting among them."""
        for replica in self._replicas:
            replica.stopping.set()
        for replica in self._replicas:
            replica.end()

    def engine(self) -> docker.DockerClient:
        """A client of the engine; one a thread, since they can't be shared."""
        return connect(self._settings.docker_host, self._settings.home)

    def serve(self, client: docker.DockerClient, name: str, index: int) -> contextlib.AbstractContextManager[Any]:
        """Start one container, hardened as the one that was load-tested."""
        found = gpus() if self._needs_gpu else []
        return sandbox.serve(
            client,
            self.image_id,
            name=f"slipway-serve-{name.replace('@', '-')}",
            home=self._settings.home,
            memory_bytes=self._resources.memory_bytes,
            cpus=self._resources.cpus,
            labels={sandbox.STAGE_LABEL: "serve", REPLICA_LABEL: name},
            gpu=found[index % len(found)].uuid if found else None,
            cores=None if self._needs_gpu else self._share_of_cores(),
            cpu_limit=self._settings.cpu_limit,
            start_timeout_s=self._resources.start_timeout_s,
            progress=lambda line: self._progress(f"{name}: {line}"),
        )

    def _share_of_cores(self) -> CoreRequest:
        """As many cores as it was tested with, and no more than an equal share of those that this process may use."""
        share = max(1, len(os.sched_getaffinity(0)) // self._of_all)
        tested = self._resources.cpus
        return CoreRequest(self._settings.locks, share if tested is None else min(share, math.ceil(tested)))

    def warm(self, server: sandbox.Server) -> None:
        """Ask for a few tokens, so that no client pays for the first; learn the model's name and context on the way.

        Raises:
            FleetError: It does not answer; says why.
        """
        try:
            with httpx.Client(base_url=server.url, timeout=_WARM_SECONDS, trust_env=False) as client:
                card = client.get("/v1/models").raise_for_status().json()["data"][0]
                self.served_as, self.context = str(card["id"]), int(card.get("max_model_len") or 0) or self.context
                for _ in range(_WARM_REQUESTS):
                    body = {"model": card["id"], "prompt": "a", "max_tokens": _WARM_TOKENS, "ignore_eos": True}
                    client.post("/v1/completions", json=body).raise_for_status()
        except (httpx.HTTPError, LookupError, TypeError, ValueError) as error:
            failure = server.failed()
            reason = error if failure is None else f"the server {failure}"
            raise FleetError(f"it is healthy and does not answer: {reason}") from error

    def tell(self, line: str) -> None:
        """Say that a replica came or went."""
        self._progress(line)
        self._changed()


class _Replica(threading.Thread):
    """Keeps one container running until it is told to stop; ``failure`` says why a start failed."""

    def __init__(self, fleet: Fleet, index: int) -> None:
        super().__init__(name=f"{fleet.release}-{index + 1}", daemon=True)
        self.stopping = threading.Event()
        self.url = ""
        self.failure: str | None = None
        self._fleet = fleet
        self._index = index
        # Names are new for each fleet: two releases' replicas, or one's before and after, are never confused.
        self.name = f"{fleet.release}-{index + 1}-{uuid.uuid4().hex[:6]}"

    def run(self) -> None:
        """Start it, watch it, start it again; a pause that doubles keeps a broken one from burning the machine."""
        pause = _FIRST_PAUSE_S
        with contextlib.closing(self._fleet.engine()) as client:
            while not self.stopping.is_set():
                try:
                    with self._fleet.serve(client, self.name, self._index) as server:
                        server.memory.stop()  # for a measurement; here it would grow for ever
                        self._fleet.warm(server)
                        self._up(server.url)
                        pause = _FIRST_PAUSE_S
                        self._watch(server)
                except (ContainerError, FleetError, docker.errors.DockerException, requests.RequestException) as error:
                    self.failure = str(error)
                    if not self.stopping.is_set():
                        self._fleet.tell(f"{self.name}: {error}")
                finally:
                    self.url = ""
                self.stopping.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    def end(self) -> None:
        """Wait for the thread; a container that is still starting is taken from under it."""
        if not self.is_alive():
            return
        self.join(2 * _POLL_SECONDS)
        with contextlib.closing(self._fleet.engine()) as client:
            while self.is_alive():
                for container in client.containers.list(
                    all=True, filters={"label": f"{REPLICA_LABEL}={self.name}"}, ignore_removed=True
                ):
                    with contextlib.suppress(docker.errors.APIError):
                        container.remove(force=True, v=True)
                self.join(_POLL_SECONDS)

    def _up(self, url: str) -> None:
        self.failure = None
        self.url = url
        self._fleet.tell(f"{self.name} serves")

    def _watch(self, server: sandbox.Server) -> None:
        while not self.stopping.wait(_POLL_SECONDS):
            died = server.died()
            if died is not None:
                self.url = ""
                self._fleet.tell(f"{self.name} {died}; starting it again")
                return


def _image(client: docker.DockerClient, reference: str, digest: str) -> str:
    """The id of the signed manifest's image, which the engine has or pulls by digest."""
    for name in (reference, digest):
        try:
            return str(client.images.get(name).id)
        except docker.errors.ImageNotFound:
            continue
    if "@" not in reference:
        raise FleetError(f"the engine has no image {digest}, which was never pushed: serve it where it was released")
    try:
        return str(client.images.pull(reference).id)
    except (docker.errors.APIError, requests.RequestException) as error:
        raise FleetError(f"the engine has no image {reference} and can't pull it: {error}") from error
