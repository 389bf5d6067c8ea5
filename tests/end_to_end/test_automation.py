"""The daemon of `slipway ui`, left alone: what it starts when a file changes, what it does not, and whom it tells."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from homes import DEMO, Slipway, make_home
from pipeline.settings import Settings
from pipeline.stages.promotion import promote
from ui_server import PATIENCE_SECONDS, RUNS, Ui, processes_of
from ui_server import REPOSITORY as LOCATION
from unit.pipeline.filled import FillingContext, Models, release
from unit.pipeline.hub_server import REPOSITORY, StandInHub, serving
from webhook_server import Webhook, listening

NEWER = "89abcdef0123456789abcdef0123456789abcdef"
TICKS = """query($sensor: SensorSelector!) { sensorOrError(sensorSelector: $sensor) { ... on Sensor {
    sensorState { status ticks(limit: 3) { timestamp status skipReason error { message } } } } } }"""
DRY_RUN = """mutation($schedule: ScheduleSelector!) { scheduleDryRun(selectorData: $schedule, timestamp: 1795658400) {
    __typename ... on DryRunInstigationTick { evaluationResult { skipReason error { message }
    runRequests { runKey } } } } }"""
SELECTOR = {"repositoryLocationName": LOCATION["repositoryLocationName"], "repositoryName": LOCATION["repositoryName"]}


@pytest.fixture(scope="module")
def hub() -> Iterator[StandInHub]:
    """A hub that has the demo's own weights."""
    with serving({path.name: path.read_bytes() for path in (DEMO / "model").iterdir()}) as found:
        yield found


@pytest.fixture(scope="module")
def webhook() -> Iterator[Webhook]:
    with listening() as found:
        yield found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, machine: Settings, hub: StandInHub) -> Models:
    """Two models that say `on-change`, one of a hub and one of a folder, released in all three of their schemes."""
    folder = tmp_path_factory.mktemp("automation")
    make_home(folder / "home", machine)
    models = Models(folder)
    models.settings = replace(models.settings, hub_endpoint=hub.endpoint)
    gptq = {"gptq": {"method": "gptq", "backend": "gptqmodel", "bits": 4, "group_size": 64}}
    for spec in (models.write("remote", source=remote(hub)), models.write("local", schemes=gptq)):
        for scheme in spec.schemes:
            context = FillingContext(spec, scheme, models.settings, lambda _: None)
            promote(context, release(context)["release"])
    return models


@pytest.fixture(scope="module")
def ui(models: Models, machine: Settings, hub: StandInHub, webhook: Webhook) -> Iterator[Ui]:
    variables = {
        **make_home(models.settings.home.parent / "another", machine),
        "SLIPWAY_HOME": str(models.settings.home), "SLIPWAY_MODELS": str(models.settings.models),
        "HF_ENDPOINT": hub.endpoint, "SLIPWAY_NOTIFY_WEBHOOK": webhook.url,
    }  # fmt: skip
    found = Ui(Slipway(variables))
    found.announced()
    yield found
    assert found.end(signal.SIGTERM) == 0
    assert not processes_of(models.settings.home)


def remote(hub: StandInHub) -> dict[str, str]:
    return {"uri": f"hf://{REPOSITORY}", "revision": hub.commit}


def tick(ui: Ui, says: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Wait for a tick of the sensor of which ``says`` holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        state = ui(TICKS, sensor={**SELECTOR, "sensorName": "model_file_sensor"})["sensorOrError"]["sensorState"]
        assert state["status"] == "RUNNING"
        assert not [each for each in state["ticks"] if each["error"]], state
        for each in state["ticks"]:
            if says(each):
                found: dict[str, Any] = each
                return found
        assert time.monotonic() < deadline, state
        time.sleep(0.5)


def runs(ui: Ui) -> dict[str, str]:
    """The status of every run, by its partition."""
    found = ui(RUNS)["runsOrError"]["results"]
    return {tag["value"]: run["status"] for run in found for tag in run["tags"] if tag["key"] == "dagster/partition"}


def on_change(models: Models, hub: StandInHub) -> None:
    models.write("remote", source=remote(hub), automation={"release": "on-change"})


def test_a_touch_starts_nothing_and_a_new_revision_exactly_its_models_releases_which_are_told_if_they_fail(
    ui: Ui, models: Models, hub: StandInHub, webhook: Webhook
) -> None:
    asked = time.time()
    on_change(models, hub)
    local = yaml_of(models, "local")
    local.write_text(local.read_text().replace("automation: {}", "") + "automation: {release: on-change}\n")
    seen = tick(ui, lambda each: each["timestamp"] > asked and "looked at: 3" in str(each["skipReason"]))
    assert seen["skipReason"] == "nothing changed; releases looked at: 3"

    asked = time.time()
    for name in ("remote", "local"):
        os.utime(yaml_of(models, name))
    os.utime(models.settings.models / "local" / "model" / "model.safetensors")
    tick(ui, lambda each: each["timestamp"] > asked and each["skipReason"] == "nothing changed; releases looked at: 3")
    assert runs(ui) == {}

    # A revision that can't be released, so that what is told of it shows too: a pickle in the place of a setting.
    hub.commit, hub.branches["main"] = NEWER, NEWER
    hub.files = {**hub.files, "config.json": b"not json"}
    models.write("remote", source=remote(hub), automation={"release": "on-change"})
    (models.settings.models / "remote.lock.json").unlink()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while runs(ui) != {"remote|awq": "FAILURE", "remote|gptq": "FAILURE"} or len(webhook.texts) < 2:
        assert set(runs(ui)) <= {"remote|awq", "remote|gptq"}
        assert time.monotonic() < deadline, (runs(ui), webhook.texts)
        time.sleep(0.5)
    assert sorted(text.splitlines()[0] for text in webhook.texts) == ["remote|awq failed", "remote|gptq failed"]
    for text in webhook.texts:
        _, reason, link = text.splitlines()
        assert reason.startswith("source: the source can't be used: config.json can't be read: no JSON")
        assert link.startswith(f"http://127.0.0.1:{ui.port}/runs/")
    # What failed is not started again for the same change.
    asked = time.time()
    os.utime(yaml_of(models, "remote"))
    tick(ui, lambda each: each["timestamp"] > asked)
    assert len(ui(RUNS)["runsOrError"]["results"]) == 2


def yaml_of(models: Models, name: str) -> Path:
    return models.settings.models / f"{name}.yaml"


def test_a_night_in_which_nothing_changed_takes_seconds_and_says_so(ui: Ui, models: Models) -> None:
    yaml_of(models, "remote").unlink()
    began = time.monotonic()
    done = ui(DRY_RUN, schedule={**SELECTOR, "scheduleName": "nightly"})["scheduleDryRun"]
    assert time.monotonic() - began < 60
    assert done["evaluationResult"]["error"] is None
    assert done["evaluationResult"]["runRequests"] == []
    assert done["evaluationResult"]["skipReason"].startswith("nothing changed; releases looked at: 1 (")
