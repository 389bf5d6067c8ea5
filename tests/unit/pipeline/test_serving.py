"""What `slipway serve` does when a step to another release fails: engine, gateway and registry are scripted here."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import docker
import pytest
from load_evidence import changed, measured

from containers.gateway.config import Routes
from pipeline.serving import fleet as fleets
from pipeline.serving import serve
from pipeline.serving.fleet import Fleet, Resources
from pipeline.serving.gateway_process import GatewayError
from pipeline.serving.serve import DesiredRelease, Options, Serving
from pipeline.settings import Settings

OLD, NEW = "sha256:" + "a" * 64, "sha256:" + "b" * 64


class Gateway:
    """Takes routes unless it is told not to; its queue is always empty."""

    def __init__(self) -> None:
        self.routes = Routes()
        self.stubborn_about: set[str] = set()

    def route(self, routes: Routes) -> None:
        if self.stubborn_about & {backend.release for backend in routes.models["demo-awq"].backends}:
            raise GatewayError("the gateway did not use the new routes within 10 s")
        self.routes = routes

    def check(self) -> None:
        """It runs."""

    def wait_idle(self, _names: set[str], _seconds: float) -> bool:
        return True

    def shares(self) -> dict[str, tuple[int, int]]:
        """Weight and replicas of each release."""
        return {each.release: (each.weight, len(each.replicas)) for each in self.routes.models["demo-awq"].backends}


class ScriptedFleet(Fleet):
    """Its containers are well at once, until they are stopped; ``images`` are those that the engine has."""

    images: frozenset[str]
    numbers = itertools.count(1)

    def engine(self) -> Any:  # noqa: ANN401 - as much of a client as is used
        def get(name: str) -> SimpleNamespace:
            if name not in self.images:
                raise docker.errors.DockerException("no engine")
            return SimpleNamespace(id=name)

        return SimpleNamespace(images=SimpleNamespace(get=get), close=lambda: None)

    @contextlib.contextmanager
    def serve(self, *_: object) -> Iterator[SimpleNamespace]:  # type: ignore[override]  # as much of a server as is used
        url = f"http://10.0.0.{next(self.numbers)}:8000"
        yield SimpleNamespace(url=url, memory=SimpleNamespace(stop=lambda: None), died=lambda: None)

    def warm(self, server: object) -> None:  # noqa: ARG002 - it is well
        self.served_as, self.context = "demo", 1024


class Scripted(Serving):
    """Serves what ``desired_now`` says; the images of ``absent`` can't be had."""

    def __init__(self, folder: Path) -> None:
        self.told: list[str] = []
        options = Options(replicas=2, every=0.0)
        super().__init__("demo-awq", "champion", options, Settings.read(), folder, self.told.append)
        self.gate = Gateway()
        self._gateway = self.gate  # type: ignore[assignment]
        self.absent: set[str] = set()
        self.desired_now: list[DesiredRelease] = []

    def to(self, *desired: DesiredRelease) -> None:
        """DesiredRelease for something else, and look."""
        self.desired_now = list(desired)
        self.look()

    def running(self) -> set[str]:  # type: ignore[override]
        """The releases that have replicas."""
        return {fleet.release for fleet in self._fleets.values()}

    def _fleet(self, release: DesiredRelease, of_all: int) -> Fleet:
        folder = self._folder / release.version
        (folder / "release" / "evidence").mkdir(parents=True, exist_ok=True)
        (folder / "release" / "evidence" / "load.json").write_text(measured().format())
        image = SimpleNamespace(reference=release.digest, digest=release.digest, minimum_driver=None)
        manifest: Any = SimpleNamespace(digest=release.digest, image=image)
        name = f"{self.name}@{release.version}"
        made = ScriptedFleet(
            self._settings, name, manifest, folder, release.replicas, of_all, self._changed, self._progress
        )  # fmt: skip
        made.images = frozenset({release.digest} - self.absent)
        return made


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    """Version 1 is served by two replicas."""
    monkeypatch.setattr(fleets, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(fleets, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(serve, "_FIRST_PAUSE_S", 0.0)
    made = Scripted(tmp_path)
    monkeypatch.setattr(serve, "desired_releases", lambda *_: made.desired_now)
    made.to(DesiredRelease("1", OLD, 100, 2))
    assert made.gate.shares() == {"demo-awq@1": (100, 2)}
    yield made
    for fleet in made._fleets.values():
        fleet.stop()


def test_routes_that_the_gateway_does_not_take_end_nothing_that_is_routed(served: Scripted) -> None:
    served.gate.stubborn_about = {"demo-awq@2"}
    served.to(DesiredRelease("2", NEW, 100, 2))
    assert served.running() == {"demo-awq@1"}
    assert served.gate.shares() == {"demo-awq@1": (100, 2)}
    assert "did not use the new routes" in served.told[-1]
    served.gate.stubborn_about = set()
    served.look()
    assert served.gate.shares() == {"demo-awq@2": (100, 2)}
    assert served.running() == {"demo-awq@2"}


def test_what_could_not_be_started_is_tried_again_though_the_desired_release_is_the_same(served: Scripted) -> None:
    served.absent = {NEW}
    served.to(DesiredRelease("2", NEW, 100, 2))
    assert served.running() == {"demo-awq@1"}
    assert "the container engine does not answer" in served.told[-1]
    served.absent = set()
    served.look()
    assert served.gate.shares() == {"demo-awq@2": (100, 2)}


def test_tries_are_further_and_further_apart(served: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_FIRST_PAUSE_S", 5.0)
    clock = [0.0]
    monkeypatch.setattr(serve, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    served._looked = -1.0
    served.absent = {NEW}
    tries = []
    start = ScriptedFleet.start

    def counted(fleet: Fleet) -> None:
        tries.append(clock[0])
        start(fleet)

    monkeypatch.setattr(ScriptedFleet, "start", counted)
    for second in range(60):
        clock[0] = float(second)
        served.to(DesiredRelease("2", NEW, 100, 2))
    assert tries == [0.0, 5.0, 15.0, 35.0]


def test_a_canary_that_becomes_champion_gets_all_its_replicas(served: Scripted) -> None:
    served.to(DesiredRelease("1", OLD, 90, 2), DesiredRelease("2", NEW, 10, 1))
    assert served.gate.shares() == {"demo-awq@1": (90, 2), "demo-awq@2": (10, 1)}
    served.to(DesiredRelease("2", NEW, 100, 2))
    assert served.gate.shares() == {"demo-awq@2": (100, 2)}
    assert served.running() == {"demo-awq@2"}


def test_a_replica_that_came_while_the_gateway_did_not_listen_is_routed_later(served: Scripted) -> None:
    served.gate.stubborn_about = {"demo-awq@1"}
    served._changed()
    served.gate.routes = Routes()
    served.gate.stubborn_about = set()
    served.look()
    assert served.gate.shares() == {"demo-awq@1": (100, 2)}


@pytest.mark.parametrize(("start_seconds", "timeout_s"), [(20.0, 600), (400.0, 1600), (None, 600)])
def test_a_replica_gets_what_its_release_was_tested_with_and_the_time_to_start(
    tmp_path: Path, start_seconds: float | None, timeout_s: float
) -> None:
    (tmp_path / "release" / "evidence").mkdir(parents=True)
    load = changed(measured(), {"server": {"start_seconds": start_seconds, "cpus": 1.5}})
    (tmp_path / "release" / "evidence" / "load.json").write_text(load.format())
    assert Resources.tested(tmp_path) == Resources(4 * 2**30, 1.5, timeout_s)


@pytest.mark.parametrize(
    ("tested", "of_all", "share"), [(None, 1, 8), (None, 2, 4), (None, 3, 2), (None, 20, 1), (1.5, 1, 2), (6.0, 2, 4)]
)
def test_replicas_share_the_cores_equally_and_take_no_more_than_they_were_tested_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tested: float | None, of_all: int, share: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "release" / "evidence").mkdir(parents=True)
    load = changed(measured(), {"server": {"cpus": tested}})
    (tmp_path / "release" / "evidence" / "load.json").write_text(load.format())
    manifest: Any = SimpleNamespace(digest=OLD, image=SimpleNamespace(minimum_driver=None))
    fleet = Fleet(Settings.read(), "demo-awq@1", manifest, tmp_path, 1, of_all, lambda: None, print)
    assert fleet._share_of_cores().count == share
