"""``slipway serve``: a release behind the gateway on this machine, following its alias without dropping a request."""

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
from pipeline.serving.gateway_process import Gateway, GatewayError, gateway
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
# What could not be served is tried again after a pause that doubles.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 600.0


class ServeError(SlipwayError):
    """Nothing can be served under this name."""


@dataclass(frozen=True)
class Wish:
    """One release that is to be served: ``weight`` percent of the traffic."""

    version: str
    digest: str
    weight: int
    replicas: int


@dataclass(frozen=True)
class Options:
    """What `serve` is told: ``parallel`` requests at one replica, a look at the alias ``every`` so many seconds."""

    replicas: int = 1
    port: int = 8080
    admin_port: int = 8081
    parallel: int = 64
    every: float = 2.0
    redis: str | None = None


def wished(name: str, alias: str, settings: Settings, replicas: int) -> list[Wish]:
    """Return what is to be served now: what the alias means, and beside a champion its canary, if there is one.

    Raises:
        RegistryError: As `registry.resolve.traffic`: `pull` would refuse it, or the registry can't be read.
    """
    first, *others = traffic(name, alias, settings.tracking_uri, policy_of(trust_of(settings)))
    shares = [(first, replicas), *((share, 1) for share in others)]
    return [
        Wish(share.version.version, share.version.manifest_digest or "", share.weight, count) for share, count in shares
    ]


def serve(
    name: str, alias: str, options: Options, settings: Settings, progress: Progress, announce: Callable[[Serving], None]
) -> None:
    """Serve what ``NAME@ALIAS`` names until Ctrl-C or SIGTERM; whatever was started is gone afterwards.

    Raises:
        SlipwayError, ContainerError, RegistryError: It can't be served.
    """
    folder = settings.home / "serving" / f"{name}@{alias}"
    folder.mkdir(parents=True, exist_ok=True)
    told = lambda: progress(f"waiting: another `slipway serve` of {name}@{alias} runs in this home")  # noqa: E731
    with interrupted_by_signals(), locked(folder / "lock", waiting=told), contextlib.suppress(KeyboardInterrupt):
        _sweep(settings, folder, progress)
        serving = Serving(name, alias, options, settings, folder, progress)
        with serving.running():
            announce(serving)
            while True:
                time.sleep(_CHECK_SECONDS)
                serving.look()


class Serving:
    """The releases that are served now, and the step from them to the ones that are wished for."""

    def __init__(
        self, name: str, alias: str, options: Options, settings: Settings, folder: Path, progress: Progress
    ) -> None:
        self.name = name
        self.alias = alias
        self.options = options
        self.wishes: list[Wish] = []
        self._settings = settings
        self._folder = folder
        self._progress = progress
        self._fleets: dict[str, Fleet] = {}
        self._gateway: Gateway | None = None
        self._publishing = threading.Lock()
        self._looked = time.monotonic()
        self._settled = True
        self._routed = True
        self._refused: list[Wish] | None = None
        self._pause_s = 0.0
        self._not_before = 0.0
        self._told = ""

    @property
    def gateway(self) -> Gateway:
        """The gateway, once it runs."""
        if self._gateway is None:
            raise ServeError("the gateway does not run yet")
        return self._gateway

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Start the replicas and the gateway; after the block the gateway drains, then the replicas go."""
        options = self.options
        chosen = {
            "port": options.port,
            "admin_port": options.admin_port,
            "redis": options.redis,
            "drain_timeout_s": 30.0,
        }
        try:
            wishes = wished(self.name, self.alias, self._settings, options.replicas)
            routes = self._folder / "routes.json"
            routes.unlink(missing_ok=True)
            with gateway(self._settings, self._folder, self._progress, **chosen) as started:
                self._gateway = started
                self._move_to(wishes)
                started.wait_ready()
                yield
                self._progress("draining")
        finally:
            self._gateway = None
            for fleet in list(self._fleets.values()):
                fleet.stop()

    def look(self) -> None:
        """See whether the alias, or the canary's share, changed, and follow.

        What can't be served leaves what is, and is tried again later.

        Raises:
            GatewayError: The gateway ended.
        """
        self.gateway.check()
        if time.monotonic() - self._looked < self.options.every:
            return
        self._looked = time.monotonic()
        try:
            wishes = wished(self.name, self.alias, self._settings, self.options.replicas)
        except RegistryError as error:
            self._tell_once(f"what is served stays as it is: {error}")
            return
        if wishes == self.wishes and self._settled and self._routed:
            return
        if wishes == self._refused and time.monotonic() < self._not_before:
            return
        try:
            self._move_to(wishes)
        except (SlipwayError, RegistryError, ContainerError) as error:
            self.gateway.check()
            first = wishes != self._refused
            self._pause_s = _FIRST_PAUSE_S if first else min(2 * self._pause_s, _LONGEST_PAUSE_S)
            self._refused, self._not_before = wishes, time.monotonic() + self._pause_s
            self._tell_once(f"what {self.name}@{self.alias} names now can't be served yet, what was is: {error}")

    def _move_to(self, wishes: list[Wish]) -> None:
        """Start what is new beside what runs, switch once it is warm, then drain and end what is not wanted."""
        self._settled = False
        known = [(wish, self._fleets[wish.digest]) for wish in wishes if wish.digest in self._fleets]
        started: list[Fleet] = []
        try:
            for wish in wishes:
                if wish.digest not in self._fleets:
                    started.append(self._fleet(wish, sum(each.replicas for each in wishes)))
                    started[-1].start()
            # A canary that became champion has one replica.
            grown = [fleet for wish, fleet in known if fleet.grow(wish.replicas)]
            for fleet in [*started, *grown]:
                fleet.wait_ready(self.gateway.check)
            self._switch(wishes, started)
        except BaseException:  # a signal among them: replicas that were started get no traffic yet
            for fleet in started:
                fleet.stop()
            raise
        self._refused, self._told = None, ""
        shown = ", ".join(f"version {wish.version} ({wish.weight}%)" for wish in wishes)
        self._progress(f"{self.name}@{self.alias}: {shown}")
        self._end_unwanted()
        self._settled = True

    def _switch(self, wishes: list[Wish], started: list[Fleet]) -> None:
        """Route to what is wished for; where the gateway does not take that, to what was."""
        before = self.wishes
        self._fleets.update({fleet.digest: fleet for fleet in started})
        self.wishes = wishes
        try:
            self._publish()
        except BaseException:  # a signal among them: the routes that worked come back
            self.wishes = before
            with contextlib.suppress(GatewayError):
                self._publish()
            for fleet in started:
                del self._fleets[fleet.digest]
            raise

    def _end_unwanted(self) -> None:
        wanted = {wish.digest for wish in self.wishes}
        for fleet in [each for digest, each in self._fleets.items() if digest not in wanted]:
            if not self.gateway.wait_idle(fleet.names(), _DRAIN_SECONDS):
                self._progress(f"{fleet.release} still answers after {_DRAIN_SECONDS:.0f} s: ending it all the same")
            fleet.stop()
            del self._fleets[fleet.digest]
            shutil.rmtree(fleet.folder, ignore_errors=True)
            self._progress(f"{fleet.release} is drained and gone")

    def _fleet(self, wish: Wish, of_all: int) -> Fleet:
        """Pull and verify a release, and make its fleet."""
        folder = self._folder / wish.digest.removeprefix("sha256:")[:16]
        pulled = pull(
            f"{self.name}@v{wish.version}",
            folder,
            tracking_uri=self._settings.tracking_uri,
            trusted_keys=trust_of(self._settings),
            progress=self._progress,
        )
        if pulled.manifest.digest != wish.digest:
            raise ServeError(f"version {wish.version} of `{self.name}` is another release than the registry said")
        release = f"{self.name}@{wish.version}"
        replicas = (wish.replicas, of_all)
        return Fleet(self._settings, release, pulled.manifest, folder, *replicas, self._changed, self._progress)

    def _changed(self) -> None:
        """A replica came or went, its thread says; `look` sees what the gateway did not take."""
        with contextlib.suppress(GatewayError):
            self._publish()

    def _publish(self) -> None:
        """Route to the replicas that are well now."""
        with self._publishing:
            if self._gateway is None or not self.wishes:
                return
            fleets = [(wish, self._fleets[wish.digest]) for wish in self.wishes]
            first = fleets[0][1]
            backends = tuple(
                Backend(
                    release=fleet.release,
                    weight=wish.weight,
                    replicas=tuple(ReplicaRoute(name=name, url=url) for name, url in sorted(fleet.up().items())),
                )
                for wish, fleet in fleets
            )
            route = ModelRoute(
                served_as=first.served_as,
                tokenizer=first.folder,
                context=min(fleet.context for _, fleet in fleets),
                parallel=self.options.parallel,
                backends=backends,
            )
            self._routed = False
            self._gateway.route(Routes(models={self.name: route}))
            self._routed = True

    def _tell_once(self, line: str) -> None:
        if line != self._told:
            self._told = line
            self._progress(line)


def _sweep(settings: Settings, folder: Path, progress: Progress) -> None:
    """Remove what a `serve` that was killed left: containers, and pulled releases."""
    with contextlib.closing(connect(settings.docker_host, settings.home)) as client:
        for name in sandbox.sweep(client, settings.home):
            progress(f"removed {name}, which a killed process left")
    for left in folder.iterdir():
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
