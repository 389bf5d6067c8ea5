"""``slipway serve``: a release behind the gateway on this machine, following its alias without losing requests."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from containers.engine.engine import connect
from containers.errors import ContainerError
from containers.gateway.config import Backend, ModelRoute, ReplicaRoute, Routes
from containers.sandbox import sandbox
from pipeline.errors import SlipwayError
from pipeline.serving.fleet import Fleet
from pipeline.serving.gateway_process import GatewayError, GatewayProcess, gateway
from pipeline.serving.servers import interrupted_by_signals
from pipeline.settings import Settings
from pipeline.trust import trust_of
from registry import pull
from registry.errors import RegistryError
from registry.file_locks import locked
from registry.policy import policy_of
from registry.progress import Progress
from registry.resolve import traffic

_DRAIN_SECONDS = 600.0
_CHECK_SECONDS = 0.5
# A release that could not be served is tried again after a pause, which doubles each time.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 600.0


class ServeError(SlipwayError):
    """The release can't be served."""


@dataclass(frozen=True)
class DesiredRelease:
    """A release that should be served, with its number of replicas; it gets ``weight`` percent of the traffic."""

    version: str
    digest: str
    weight: int
    replicas: int


@dataclass(frozen=True)
class Options:
    """The options of `serve`: at most ``parallel`` requests at a replica; the alias is read every ``every`` seconds.

    ``variant`` is a serving variant in place of the main configuration.
    """

    replicas: int = 1
    port: int = 8080
    admin_port: int = 8081
    parallel: int = 64
    every: float = 2.0
    redis: str | None = None
    variant: str | None = None


def desired_releases(name: str, alias: str, settings: Settings, replicas: int) -> list[DesiredRelease]:
    """Return the releases that should be served now: the alias's, and for the champion also its canary, if any.

    Raises:
        RegistryError: as `registry.resolve.traffic`: `pull` would refuse a release, or the registry can't be read.
    """
    first, *others = traffic(name, alias, settings.tracking_uri, policy_of(trust_of(settings)))
    shares = [(first, replicas), *((share, 1) for share in others)]
    return [
        DesiredRelease(share.version.version, share.version.manifest_digest or "", share.weight, count)
        for share, count in shares
    ]


def serve(
    name: str, alias: str, options: Options, settings: Settings, progress: Progress, announce: Callable[[Serving], None]
) -> None:
    """Serve the release of ``NAME@ALIAS`` until Ctrl-C or SIGTERM, then end all that was started.

    Raises:
        SlipwayError, ContainerError, RegistryError: it can't be served.
    """
    folder = settings.home / "serving" / f"{name}@{alias}"
    folder.mkdir(parents=True, exist_ok=True)
    notify = lambda: progress(f"waiting: another `slipway serve` of {name}@{alias} runs in this home")  # noqa: E731
    with interrupted_by_signals(), locked(folder / "lock", waiting=notify), contextlib.suppress(KeyboardInterrupt):
        _sweep(settings, folder, progress)
        serving = Serving(name, alias, options, settings, folder, progress)
        with serving.running():
            announce(serving)
            while True:
                time.sleep(_CHECK_SECONDS)
                serving.look()


class Serving:
    """The releases that are served now, and the switch from them to the desired ones."""

    def __init__(
        self, name: str, alias: str, options: Options, settings: Settings, folder: Path, progress: Progress
    ) -> None:
        self.name = name
        self.alias = alias
        self.options = options
        self.desired: list[DesiredRelease] = []
        self._settings = settings
        self._folder = folder
        self._progress = progress
        self._fleets: dict[str, Fleet] = {}
        self._gateway: GatewayProcess | None = None
        self._publishing = threading.Lock()
        self._looked = time.monotonic()
        self._settled = True
        self._routed = True
        self._refused: list[DesiredRelease] | None = None
        self._pause_s = 0.0
        self._not_before = 0.0
        self._last_line = ""

    @property
    def gateway(self) -> GatewayProcess:
        """The running gateway; `ServeError` before it runs."""
        if self._gateway is None:
            raise ServeError("the gateway does not run yet")
        return self._gateway

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Start the replicas and the gateway; after the block, drain the gateway, then end the replicas."""
        options = self.options
        chosen = {
            "port": options.port,
            "admin_port": options.admin_port,
            "redis": options.redis,
            "drain_timeout_s": 30.0,
        }
        try:
            desired = desired_releases(self.name, self.alias, self._settings, options.replicas)
            routes = self._folder / "routes.json"
            routes.unlink(missing_ok=True)
            with gateway(self._settings, self._folder, self._progress, **chosen) as started:
                self._gateway = started
                self._move_to(desired)
                started.wait_ready()
                yield
                self._progress("draining")
        finally:
            self._gateway = None
            for fleet in list(self._fleets.values()):
                fleet.stop()

    def look(self) -> None:
        """Read the alias and the canary's share, and switch if they changed.

        If the new releases can't be served, the current ones stay, and the new ones are tried again later.

        Raises:
            GatewayError: the gateway ended.
        """
        self.gateway.check()
        if time.monotonic() - self._looked < self.options.every:
            return
        self._looked = time.monotonic()
        try:
            desired = desired_releases(self.name, self.alias, self._settings, self.options.replicas)
        except RegistryError as error:
            self._report_once(f"registry unreachable, keeping current routes: {error}")
            return
        if desired == self.desired and self._settled and self._routed:
            return
        if desired == self._refused and time.monotonic() < self._not_before:
            return
        try:
            self._move_to(desired)
        except (SlipwayError, RegistryError, ContainerError) as error:
            self.gateway.check()
            first = desired != self._refused
            self._pause_s = _FIRST_PAUSE_S if first else min(2 * self._pause_s, _LONGEST_PAUSE_S)
            self._refused, self._not_before = desired, time.monotonic() + self._pause_s
            self._report_once(
                f"{self.name}@{self.alias} changed, but its release can't be served; keeping current routes: {error}"
            )

    def _move_to(self, desired: list[DesiredRelease]) -> None:
        """Start new releases beside those that run, switch once they are warm, then drain and end unwanted ones."""
        self._settled = False
        known = [(release, self._fleets[release.digest]) for release in desired if release.digest in self._fleets]
        started: list[Fleet] = []
        try:
            for release in desired:
                if release.digest not in self._fleets:
                    started.append(self._fleet(release, sum(each.replicas for each in desired)))
                    started[-1].start()
            # A canary has one replica; it may have become champion.
            grown = [fleet for release, fleet in known if fleet.grow(release.replicas)]
            for fleet in [*started, *grown]:
                fleet.wait_ready(self.gateway.check)
            self._switch(desired, started)
        except BaseException:  # also for a signal: the new replicas get no traffic yet
            for fleet in started:
                fleet.stop()
            raise
        self._refused, self._last_line = None, ""
        shown = ", ".join(f"version {release.version} ({release.weight}%)" for release in desired)
        self._progress(f"{self.name}@{self.alias}: {shown}")
        self._end_unwanted()
        self._settled = True

    def _switch(self, desired: list[DesiredRelease], started: list[Fleet]) -> None:
        """Route to the desired releases; if the gateway refuses those routes, restore the previous ones."""
        before = self.desired
        self._fleets.update({fleet.digest: fleet for fleet in started})
        self.desired = desired
        try:
            self._publish()
        except BaseException:  # also for a signal: restore the routes that worked
            self.desired = before
            with contextlib.suppress(GatewayError):
                self._publish()
            for fleet in started:
                del self._fleets[fleet.digest]
            raise

    def _end_unwanted(self) -> None:
        wanted = {release.digest for release in self.desired}
        for fleet in [each for digest, each in self._fleets.items() if digest not in wanted]:
            if not self.gateway.wait_idle(fleet.names(), _DRAIN_SECONDS):
                self._progress(f"{fleet.release} still has requests after {_DRAIN_SECONDS:.0f} s: ending it anyway")
            fleet.stop()
            del self._fleets[fleet.digest]
            shutil.rmtree(fleet.folder, ignore_errors=True)
            self._progress(f"{fleet.release} is drained and has ended")

    def _fleet(self, release: DesiredRelease, of_all: int) -> Fleet:
        """Pull and verify a release, and make its fleet."""
        folder = self._folder / release.digest.removeprefix("sha256:")[:16]
        pulled = pull(
            f"{self.name}@v{release.version}",
            folder,
            tracking_uri=self._settings.tracking_uri,
            trusted_keys=trust_of(self._settings),
            variant=self.options.variant,
            progress=self._progress,
        )
        if pulled.manifest.digest != release.digest:
            raise ServeError(
                f"version {release.version} of `{self.name}` has another digest than the registry states: try again"
            )
        name = f"{self.name}@{release.version}"
        replicas = (release.replicas, of_all)
        return Fleet(
            self._settings, name, pulled.manifest, folder, *replicas, self._changed, self._progress,
            self.options.variant,
        )  # fmt: skip

    def _changed(self) -> None:
        """Update the routes after a replica started or ended; `look` repeats this if the gateway refuses."""
        with contextlib.suppress(GatewayError):
            self._publish()

    def _publish(self) -> None:
        """Route to the replicas that are healthy now."""
        with self._publishing:
            if self._gateway is None or not self.desired:
                return
            fleets = [(release, self._fleets[release.digest]) for release in self.desired]
            first = fleets[0][1]
            backends = tuple(
                Backend(
                    release=fleet.release,
                    weight=release.weight,
                    replicas=tuple(ReplicaRoute(name=name, url=url) for name, url in sorted(fleet.up().items())),
                )
                for release, fleet in fleets
            )
            route = ModelRoute(
                served_as=first.served_as,
                tokenizer=first.folder,
                context=min(fleet.context for _, fleet in fleets),
                parallel=self.options.parallel,
                adapters=tuple(name for name in first.adapters if all(name in fleet.adapters for _, fleet in fleets)),
                backends=backends,
            )
            self._routed = False
            self._gateway.route(Routes(models={self.name: route}))
            self._routed = True

    def _report_once(self, line: str) -> None:
        if line != self._last_line:
            self._last_line = line
            self._progress(line)


def _sweep(settings: Settings, folder: Path, progress: Progress) -> None:
    """Remove the containers and pulled releases that a killed `serve` left."""
    with contextlib.closing(connect(settings.docker_host, settings.home)) as client:
        for name in sandbox.sweep(client, settings.home):
            progress(f"removed container {name}, left by a killed process")
    for left in folder.iterdir():
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
