"""`slipway serve` whole: signed releases from a real registry, real containers, real traffic; losses are counted.

The containers run a scripted server, so that what is measured is the serving and not this machine's cores.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import httpx
import load_evidence
import pytest
from docker.models.containers import Container
from release_folder import FILES, make_release
from serve_command import Served, serving

from containers.engine.owner import HOME_LABEL, home_digest
from containers.image.base import ensure_base
from containers.image.profile import load
from gateways import TOKENIZER
from homes import Slipway, make_home
from open_loop import Outcome, drive, quantile
from pipeline.settings import Settings
from registry import rollback
from registry.promote import promote
from registry.signing import load_or_create_key
from server_image import server_image

NAME = "demo-awq"
BODY = {"model": NAME, "prompt": "def", "max_tokens": 8}
LOAD = load_evidence.changed(load_evidence.measured(), {"memory": {"limit_bytes": 256 * 2**20}})


@pytest.fixture(scope="module")
def image(engine: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The scripted server on the base of the CPU runtime; a stream of it takes 0.4 s."""
    base = ensure_base(engine, load("vllm-cpu"), tmp_path_factory.mktemp("base"), print)
    with server_image(engine, base.reference, "--service-ms", "400") as built:
        yield built


@pytest.fixture(scope="module")
def slipway(tmp_path_factory: pytest.TempPathFactory, machine: Settings, image: str) -> Slipway:
    """A home whose registry has two releases of one line: version 2 is champion, version 1 was before."""
    command = Slipway(make_home(tmp_path_factory.mktemp("slipway") / "home", machine))
    settings = Settings.read(dict(command.variables))
    key = load_or_create_key(settings.signing_key)
    files = {
        **FILES,
        "tokenizer.json": (TOKENIZER / "tokenizer.json").read_bytes(),
        "release/evidence/load.json": LOAD.format().encode(),
        "release/evidence/variants/short/load.json": LOAD.format().encode(),
    }
    more: dict[str, Any] = {"image_id": image, "variants": {"short": ["--context", "512"]}}
    for number in (1, 2):
        folder = tmp_path_factory.mktemp("release")
        make_release(folder, key, files=files, created=f"2026-11-24T01:02:0{number}Z", **more)
        promote(folder, settings.tracking_uri, [key.public], key=key)
    return command


def traffic(served: Served, seconds: float, rate: float = 20.0) -> Callable[[], list[Outcome]]:
    """Begin to send; returns what waits for the outcomes."""
    found: list[Outcome] = []
    run = drive(served.told["url"], served.key, BODY, rate=rate, seconds=seconds)
    thread = threading.Thread(target=lambda: found.extend(asyncio.run(run)))
    thread.start()

    def outcomes() -> list[Outcome]:
        thread.join()
        return found

    return outcomes


def containers(engine: docker.DockerClient, slipway: Slipway) -> list[Container]:
    return engine.containers.list(all=True, filters={"label": f"{HOME_LABEL}={home_digest(slipway.home)}"})


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.1)


def p95(outcomes: list[Outcome], start: float, end: float) -> float:
    return quantile([each.seconds for each in outcomes if start <= each.due < end], 0.95)


@pytest.mark.timed
def test_a_killed_replica_costs_no_request_and_returns_by_itself(engine: docker.DockerClient, slipway: Slipway) -> None:
    with serving(slipway, NAME, "--replicas", "2") as served:
        assert served.told["releases"] == [{"version": "2", "weight": 100}]
        before = set(served.replicas())
        outcomes = traffic(served, 30)
        time.sleep(8)
        containers(engine, slipway)[0].kill()
        found = outcomes()
        assert {each.result for each in found if not each.stream} == {"ok"}
        assert {each.result for each in found if each.stream} <= {"ok", "error event"}
        assert sum(each.result == "error event" for each in found) <= 12, "only streams that ran there at that moment"
        assert p95(found, 18, 30) < p95(found, 2, 8) + 0.2, "after ten seconds it is as it was"
        wait_until(lambda: list(served.replicas().values()) == ["ready", "ready"])
        assert len(set(served.replicas()) & before) == 2
        assert len(containers(engine, slipway)) == 2
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(60) == 0
    assert containers(engine, slipway) == []


def test_a_champion_that_changes_under_load_costs_no_request(engine: docker.DockerClient, slipway: Slipway) -> None:
    settings = Settings.read(dict(slipway.variables))
    key = load_or_create_key(settings.signing_key)
    with serving(slipway, NAME, "--replicas", "2") as served:
        outcomes = traffic(served, 40)
        for pause in (5, 15):
            time.sleep(pause)
            rollback(NAME, settings.tracking_uri, [key.public])
        found = outcomes()
        assert {each.result for each in found} == {"ok"}
        order = [each.release for each in sorted(found, key=lambda each: each.due)]
        changes = [order[0], *(b for a, b in itertools.pairwise(order) if a != b)]
        assert changes[0] == changes[-1] == f"{NAME}@2"
        assert f"{NAME}@1" in changes
        wait_until(lambda: len(containers(engine, slipway)) == 2)
    assert containers(engine, slipway) == []


def test_what_a_killed_serve_left_is_swept_by_the_next(engine: docker.DockerClient, slipway: Slipway) -> None:
    with serving(slipway, NAME) as served:
        admin = served.told["admin_url"]
        os.kill(served.process.pid, signal.SIGKILL)
        served.process.wait()
        assert len(containers(engine, slipway)) == 1
        left = containers(engine, slipway)[0].name

        def gone() -> bool:
            try:
                return httpx.get(f"{admin}/health").status_code != 200
            except httpx.HTTPError:
                return True

        wait_until(gone)
    with serving(slipway, NAME):
        assert left not in [each.name for each in containers(engine, slipway)]
    assert containers(engine, slipway) == []


def test_a_variant_is_served_with_its_own_arguments_and_no_other_is(slipway: Slipway) -> None:
    with serving(slipway, NAME, "--variant", "short") as served:
        assert served.model()["max_model_len"] == 512
    done = slipway("serve", NAME, "--variant", "long", "--port", "0", "--admin-port", "0")
    assert done.returncode == 1
    assert "demo-awq does not list the variant `long`, so it did not pass its gates (it lists `short`)" in done.stderr


def test_what_is_not_released_is_not_served(slipway: Slipway) -> None:
    done = slipway("serve", "demo-gptq")
    assert done.returncode == 1
    assert "no release `demo-gptq`" in done.stderr


def test_keys_are_made_listed_and_revoked(slipway: Slipway) -> None:
    made = json.loads(
        slipway("keys", "add", "--owner", "ann", "--tokens-per-minute", "500", "--days", "1", "--json").stdout
    )
    assert made["limits"]["tokens_per_minute"] == 500
    assert made["key"].startswith(f"slw-{made['id']}-")
    assert slipway("keys", "revoke", made["id"]).returncode == 0
    listed = {each["id"]: each for each in json.loads(slipway("keys", "list", "--json").stdout)}
    assert (listed[made["id"]]["state"], listed[made["id"]]["owner"]) == ("revoked", "ann")
    assert "sha256" not in listed[made["id"]]
    assert slipway("keys", "revoke", "nobody").returncode == 1
    assert not [path for path in (Path(slipway.home) / "gateway").iterdir() if made["key"] in path.read_text()]
