"""The replicas of one release: hardened containers of its image, each watched and restarted by its own thread."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import docker
import httpx
import requests

from containers.engine.engine import connect
from containers.errors import ContainerError
from containers.hardware import gpu_pool
from containers.hardware.core_pool import CoreRequest
from containers.sandbox import sandbox
from evals.load.evidence import read_load_evidence
from evals.load.variants import folder as variant_folder
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
    """A release can't be served: its image is missing, or its replicas don't become healthy."""


@dataclass(frozen=True)
class Resources:
    """What a replica gets: what its release was load-tested with."""

    memory_bytes: int
    cpus: float | None
    start_timeout_s: float
    ranks: int = 1

    @classmethod
    def tested(cls, folder: Path, variant: str | None = None) -> Resources:
        """Read the resources from a pulled release's load test, or that of a variant.

        Raises:
            LoadEvidenceError: its evidence can't be read.
        """
        place = folder / EVIDENCE
        evidence = read_load_evidence(place if variant is None else place / variant_folder(variant))
        timeout = max(_LEAST_START_TIMEOUT_S, _STARTS * (evidence.server.start_seconds or 0.0))
        return cls(evidence.memory.limit_bytes, evidence.server.cpus, timeout, evidence.server.ranks)


class Fleet:
    """``count`` replicas of one release. Call `start`, then `wait_ready`; call `stop` at the end, even after an error.

    ``of_all`` is the number of replicas of all releases, which share the machine's cores. ``changed`` is called, from
    any thread, whenever a replica starts or ends. A ``variant`` is served with the arguments that the manifest lists.
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
        variant: str | None = None,
    ) -> None:
        self.release = release
        self.digest = manifest.digest
        self.folder = folder
        self.adapters = tuple(manifest.adapters)
        self.served_as, self.context = "", 0
        self._settings = settings
        self._changed = changed
        self._progress = progress
        configuration = manifest.configuration(variant)
        self._command = None if variant is None or configuration is None else configuration.command
        self._resources = Resources.tested(folder, variant)
        self._of_all = of_all
        self._needs_gpu = manifest.image.minimum_driver is not None
        self._image = manifest.image
        self._replicas = [_Replica(self, number) for number in range(1, count + 1)]

    def start(self) -> None:
        """Begin to start all replicas.

        Raises:
            FleetError: the engine does not have this image and can't pull it, or does not answer.
        """
        try:
            with contextlib.closing(self.engine()) as client:
                self.image_id = _image(client, self._image.reference, self._image.digest)
        except (docker.errors.DockerException, requests.RequestException) as error:
            raise FleetError(
                f"the container engine does not answer: {error}: check it with `slipway doctor`"
            ) from error
        for replica in self._replicas:
            replica.start()

    def grow(self, count: int) -> bool:
        """Begin to start more replicas, up to ``count``; return whether any were missing. Running ones stay."""
        before = len(self._replicas)
        for number in range(before + 1, count + 1):
            replica = _Replica(self, number)
            self._replicas.append(replica)
            replica.start()
        return count > before

    def wait_ready(self, check: Callable[[], None]) -> None:
        """Wait until every replica is healthy and warm; ``check`` is called meanwhile and may raise.

        Raises:
            FleetError: a replica failed to start.
        """
        while not all(replica.url for replica in self._replicas):
            for replica in self._replicas:
                if replica.failure is not None:
                    raise FleetError(f"{replica.name} does not become healthy: {replica.failure}")
            check()
            threading.Event().wait(_POLL_SECONDS / 2)

    def up(self) -> dict[str, str]:
        """The URLs of the healthy replicas, by name."""
        return {replica.name: replica.url for replica in self._replicas if replica.url}

    def names(self) -> set[str]:
        """The names of all replicas, healthy or not."""
        return {replica.name for replica in self._replicas}

    def stop(self) -> None:
        """End and remove all replicas, including those that are still starting."""
        for replica in self._replicas:
            replica.stopping.set()
        for replica in self._replicas:
            replica.end()

    def engine(self) -> docker.DockerClient:
        """A new client of the engine; each thread needs its own."""
        return connect(self._settings.docker_host, self._settings.home)

    @contextlib.contextmanager
    def serve(self, client: docker.DockerClient, name: str) -> Iterator[sandbox.Server]:
        """Start one container, hardened like the one that was load-tested, on GPUs or cores of its own.

        Raises:
            GpuPoolError: too few GPUs are free; a replica does not wait, so that the current releases go on.
            ContainerError: it does not start.
        """
        progress = lambda line: self._progress(f"{name}: {line}")  # noqa: E731
        ranks = self._resources.ranks if self._needs_gpu else 0
        with (
            gpu_pool.reserved(ranks, progress, self._settings.locks, wait=False) as devices,
            sandbox.serve(
                client,
                self.image_id,
                name=f"slipway-serve-{name.replace('@', '-')}",
                home=self._settings.home,
                memory_bytes=self._resources.memory_bytes,
                cpus=self._resources.cpus,
                command=self._command,
                labels={sandbox.STAGE_LABEL: "serve", REPLICA_LABEL: name},
                gpus=[gpu.uuid for gpu in devices],
                cores=None if self._needs_gpu else self._share_of_cores(),
                cpu_limit=self._settings.cpu_limit,
                start_timeout_s=self._resources.start_timeout_s,
                progress=progress,
            ) as server,
        ):
            yield server

    def _share_of_cores(self) -> CoreRequest:
        """The cores that it was tested with, but at most an equal share of those that this process may use."""
        share = max(1, len(os.sched_getaffinity(0)) // self._of_all)
        tested = self._resources.cpus
        count = share if tested is None else min(share, math.ceil(tested))
        return CoreRequest(self._settings.locks, count, ranks=self._resources.ranks)

    def warm(self, server: sandbox.Server) -> None:
        """Request a few tokens, so that the first client need not wait; read the model's name and context too.

        Raises:
            FleetError: the server does not answer; says why.
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
            raise FleetError(f"it is healthy but does not answer: {reason}") from error

    def report(self, line: str) -> None:
        """Report that a replica started or ended."""
        self._progress(line)
        self._changed()


class _Replica(threading.Thread):
    """Keeps one container running until ``stopping`` is set; ``failure`` says why a start failed."""

    def __init__(self, fleet: Fleet, number: int) -> None:
        super().__init__(name=f"{fleet.release}-{number}", daemon=True)
        self.stopping = threading.Event()
        self.url = ""
        self.failure: str | None = None
        self._fleet = fleet
        # Unique for each fleet, so that the replicas of two fleets of one release have different names.
        self.name = f"{fleet.release}-{number}-{uuid.uuid4().hex[:6]}"

    def run(self) -> None:
        """Start the container, watch it and restart it, after pauses that double while starts fail."""
        pause = _FIRST_PAUSE_S
        with contextlib.closing(self._fleet.engine()) as client:
            while not self.stopping.is_set():
                try:
                    with self._fleet.serve(client, self.name) as server:
                        server.memory.stop()  # measurements are not needed here, and would fill the memory
                        self._fleet.warm(server)
                        self._up(server.url)
                        pause = _FIRST_PAUSE_S
                        self._watch(server)
                except (ContainerError, FleetError, docker.errors.DockerException, requests.RequestException) as error:
                    self.failure = str(error)
                    if not self.stopping.is_set():
                        self._fleet.report(f"{self.name}: {error}")
                finally:
                    self.url = ""
                self.stopping.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    def end(self) -> None:
        """Wait for the thread to end; remove its container if that is still starting."""
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
        self._fleet.report(f"{self.name} serves")

    def _watch(self, server: sandbox.Server) -> None:
        while not self.stopping.wait(_POLL_SECONDS):
            died = server.died()
            if died is not None:
                self.url = ""
                self._fleet.report(f"{self.name} {died}; restarting it")
                return


def _image(client: docker.DockerClient, reference: str, digest: str) -> str:
    """The id of the manifest's image in the engine, which pulls it by digest if necessary."""
    for name in (reference, digest):
        try:
            return str(client.images.get(name).id)
        except docker.errors.ImageNotFound:
            continue
    if "@" not in reference:
        raise FleetError(
            f"the engine has no image {digest}, and it was never pushed to a registry: serve it where it was released"
        )
    try:
        return str(client.images.pull(reference).id)
    except (docker.errors.APIError, requests.RequestException) as error:
        raise FleetError(f"the engine has no image {reference}, and can't pull it: {error}") from error
