"""What happens by itself: what each tick starts, of which release, how urgently, or why nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster import (
    DagsterInstance,
    DagsterRunStatus,
    DefaultScheduleStatus,
    DefaultSensorStatus,
    RunRequest,
    build_schedule_context,
    build_sensor_context,
)
from dagster._core.definitions.schedule_definition import ScheduleExecutionData
from dagster._core.definitions.sensor_definition import SensorExecutionData

from homes import DEMO
from pipeline.definitions import defs
from pipeline.orchestration import automation
from pipeline.orchestration.instance import open_instance
from pipeline.orchestration.metrics import ChampionState
from pipeline.orchestration.partitions import add_partitions
from pipeline.sources.lock import Lock, LockedFile, write_lock
from pipeline.spec import Automation, ModelSpec
from unit.pipeline.filled import Models
from unit.pipeline.hub_server import REPOSITORY, serving
from webhook_server import listening

# Dagster's own names of a partition's dimensions.
pytestmark = pytest.mark.filterwarnings(r"ignore:Non-compliant tag keys like \['dagster/partition")
NIGHT = datetime(2026, 11, 27, 2, 0, tzinfo=UTC)
ON_CHANGE, NIGHTLY = {"release": "on-change"}, {"release": "nightly"}


class Ticks:
    """Evaluates sensors and schedules as the daemon does, which keeps the cursor and makes partitions."""

    def __init__(self, models: Models, instance: DagsterInstance) -> None:
        self.models = models
        self.instance = instance
        self.settings = models.settings
        self.cursor: str | None = None

    def watch(self) -> SensorExecutionData:
        """A tick of the sensor."""
        with build_sensor_context(
            cursor=self.cursor, instance_ref=self.instance.get_ref(), resources={"settings": self.settings},
            repository_def=defs.get_repository_def(), sensor_name="model_file_sensor",
        ) as context:  # fmt: skip
            done = automation.model_file_sensor.evaluate_tick(context)
        self.cursor = done.cursor
        for request in done.dynamic_partitions_requests or ():
            if type(request).__name__ == "AddDynamicPartitionsRequest":
                self.instance.add_dynamic_partitions(request.partitions_def_name, request.partition_keys)
            else:
                for key in request.partition_keys:
                    self.instance.delete_dynamic_partition(request.partitions_def_name, key)
        return done

    def night(self, schedule: str = "nightly") -> ScheduleExecutionData:
        """A tick of a schedule."""
        definition = next(each for each in automation.SCHEDULES if each.name == schedule)
        with build_schedule_context(
            instance_ref=self.instance.get_ref(),
            scheduled_execution_time=NIGHT,
            resources={"settings": self.settings},
            repository_def=defs.get_repository_def(),
        ) as context:
            return definition.evaluate_tick(context)

    def partitions(self) -> tuple[set[str], set[str]]:
        return set(self.instance.get_dynamic_partitions("model")), set(self.instance.get_dynamic_partitions("scheme"))


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


@pytest.fixture
def ticks(models: Models, instance_variables: None) -> Iterator[Ticks]:
    with open_instance(models.settings) as instance:
        yield Ticks(models, instance)


def write(models: Models, says: dict[str, Any], model: str = "demo", **changes: Any) -> ModelSpec:  # noqa: ANN401
    return models.write(model, automation=says, **changes)


def released(models: Models, monkeypatch: pytest.MonkeyPatch, says: dict[str, Any]) -> ModelSpec:
    """The demo, released, registered and with an `automation` section."""
    spec = write(models, says)
    signed = {f"demo-{scheme}": made for scheme, made in models.release(spec).items()}

    def registered(_uri: str, name: str) -> list[Any]:
        made = signed[name]
        assert made is not None
        digest = f"sha256:{made.files['release/manifest.json'].sha256}"
        return [type("Version", (), {"manifest_digest": digest, "aliases": ("candidate", "champion")})]

    monkeypatch.setattr("pipeline.stages.affected.catalog.current", registered)
    return spec


def partitions_of(requests: Sequence[RunRequest] | None) -> list[str]:
    return sorted(str(request.partition_key) for request in requests or ())


def under_way(instance: DagsterInstance, partition: str) -> None:
    """Record a run of a release that has begun."""
    instance.create_run(
        job_name="release_model", run_id=None, run_config=None, resolved_op_selection=None, step_keys_to_execute=None,
        status=DagsterRunStatus.STARTED, tags={"dagster/partition": partition}, root_run_id=None, parent_run_id=None,
        job_snapshot=None, execution_plan_snapshot=None, parent_job_snapshot=None, asset_selection=None,
        asset_check_selection=None, op_selection=None, remote_job_origin=None, job_code_origin=None, asset_graph=None,  # type: ignore[arg-type]
    )  # fmt: skip


def test_nothing_happens_by_itself_unless_a_file_asks_for_it_and_then_nothing_is_to_be_clicked(ticks: Ticks) -> None:
    assert Automation() == Automation(release="by-hand", upstream="locked", rescan="by-hand", load="by-hand")
    ticks.models.write()
    assert ticks.watch().run_requests == []
    for schedule in automation.SCHEDULES:
        done = ticks.night(schedule.name)
        assert done.run_requests == []
        assert done.skip_message is not None
        assert "file says `automation: {" in done.skip_message
        assert schedule.default_status == DefaultScheduleStatus.RUNNING
    assert automation.model_file_sensor.default_status == DefaultSensorStatus.RUNNING


def test_partitions_come_and_go_with_the_models_files(ticks: Ticks) -> None:
    ticks.models.write()
    ticks.watch()
    assert ticks.partitions() == ({"demo"}, {"awq", "gptq"})
    only = {"q8": {"method": "gptq", "backend": "gptqmodel", "bits": 8, "group_size": 64}}
    other = ticks.models.write("other", schemes=only)
    ticks.watch()
    assert ticks.partitions() == ({"demo", "other"}, {"awq", "gptq", "q8"})
    other.path.write_text("model: [")
    assert "other.yaml" in str(ticks.watch().skip_message)
    assert ticks.partitions() == ({"demo", "other"}, {"awq", "gptq", "q8"})
    other.path.unlink()
    ticks.watch()
    assert ticks.partitions() == ({"demo"}, {"awq", "gptq"})


def test_a_partition_that_no_file_of_the_folder_ever_named_is_left_alone(ticks: Ticks) -> None:
    spec = ticks.models.write("elsewhere")
    add_partitions(ticks.instance, spec)
    spec.path.unlink()
    ticks.models.write()
    ticks.watch()
    ticks.watch()
    assert ticks.partitions()[0] == {"demo", "elsewhere"}


def test_a_new_model_that_asks_for_it_is_released_in_the_tick_that_finds_it(ticks: Ticks) -> None:
    write(ticks.models, ON_CHANGE)
    done = ticks.watch()
    assert partitions_of(done.run_requests) == ["demo|awq", "demo|gptq"]
    assert {request.tags["slipway/why"] for request in done.run_requests or ()} == {"source: never made"}


def test_a_change_on_disk_starts_exactly_the_affected_releases_and_a_touch_starts_none(
    ticks: Ticks, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = released(ticks.models, monkeypatch, ON_CHANGE)
    assert "nothing changed; releases looked at: 2" in str(ticks.watch().skip_message)
    os.utime(spec.path)
    assert "nothing changed" in str(ticks.watch().skip_message)
    schemes = yaml.safe_load(spec.path.read_text())["schemes"]
    schemes["gptq"]["group_size"] = 32
    write(ticks.models, ON_CHANGE, schemes=schemes)
    (request,) = ticks.watch().run_requests or ()
    assert request.partition_key == "demo|gptq"
    assert request.tags["dagster/priority"] == "5"
    assert request.tags["slipway/why"] == "quantized: group_size changed"
    # Started once: what becomes of it is the run's business.
    assert ticks.watch().run_requests == []


def test_what_nobody_touched_is_not_looked_at_again(ticks: Ticks, monkeypatch: pytest.MonkeyPatch) -> None:
    released(ticks.models, monkeypatch, ON_CHANGE)
    ticks.watch()
    monkeypatch.setattr(automation, "affected", lambda *_: pytest.fail("looked"))
    assert "nothing changed" in str(ticks.watch().skip_message)


def test_a_release_that_is_under_way_is_waited_for(ticks: Ticks) -> None:
    write(ticks.models, ON_CHANGE)
    ticks.models.write()
    under_way(ticks.instance, "demo|gptq")
    write(ticks.models, ON_CHANGE)
    assert partitions_of(ticks.watch().run_requests) == ["demo|awq"]
    (waiting,) = ticks.instance.get_runs()
    ticks.instance.report_run_canceled(waiting)
    assert partitions_of(ticks.watch().run_requests) == ["demo|awq", "demo|gptq"]


def test_the_same_change_has_the_same_run_key_so_that_a_failed_run_is_not_started_for_ever(ticks: Ticks) -> None:
    write(ticks.models, ON_CHANGE)
    first = {request.run_key for request in ticks.watch().run_requests or ()}
    os.utime(ticks.models.settings.models / "demo.yaml")
    assert {request.run_key for request in ticks.watch().run_requests or ()} == first


def test_a_night_in_which_nothing_changed_says_so(ticks: Ticks, monkeypatch: pytest.MonkeyPatch) -> None:
    released(ticks.models, monkeypatch, NIGHTLY)
    ticks.watch()
    done = ticks.night()
    assert done.run_requests == []
    assert str(done.skip_message).startswith("nothing changed; releases looked at: 2 (")


def test_a_night_releases_what_changed_after_everything_else_and_again_the_night_after(ticks: Ticks) -> None:
    write(ticks.models, NIGHTLY)
    assert ticks.watch().run_requests == []
    requests = ticks.night().run_requests or []
    assert partitions_of(requests) == ["demo|awq", "demo|gptq"]
    assert {request.tags["dagster/priority"] for request in requests} == {"-5"}
    assert all(str(request.run_key).endswith("2026-11-27") for request in requests)


def champion(name: str, *, marked: bool = False) -> ChampionState:
    return ChampionState(release=name, version="1", manifest_digest="sha256:ab", marked=marked)


def test_a_champion_that_a_rescan_refuses_is_rebuilt_first(ticks: Ticks, monkeypatch: pytest.MonkeyPatch) -> None:
    write(ticks.models, NIGHTLY)
    ticks.watch()
    monkeypatch.setattr(automation, "champions", lambda _: [champion("demo-awq", marked=True)])
    requests = ticks.night().run_requests or []
    assert {request.partition_key: request.tags["dagster/priority"] for request in requests} == {
        "demo|awq": "10", "demo|gptq": "-5",
    }  # fmt: skip


@pytest.mark.parametrize("upstream", ["locked", "follow"])
def test_a_branch_that_moved_is_followed_where_the_file_says_so_and_told_where_not(ticks: Ticks, upstream: str) -> None:
    source = {"uri": f"hf://{REPOSITORY}", "revision": "main"}
    spec = write(ticks.models, {"release": "nightly", "upstream": upstream}, source=source)
    files = {"config.json": LockedFile(size=2, sha256="0" * 64)}
    write_lock(Lock(path=spec.lock, uri=f"hf://{REPOSITORY}", revision="f" * 40, files=files))
    ticks.watch()
    with serving({path.name: path.read_bytes() for path in (DEMO / "model").iterdir()}) as hub:
        ticks.settings = replace(ticks.settings, hub_endpoint=hub.endpoint)
        done = ticks.night()
    assert spec.lock.exists() == (upstream == "locked")
    assert partitions_of(done.run_requests) == ["demo|awq", "demo|gptq"]


def test_a_hub_that_does_not_answer_is_said_and_told_and_starts_nothing(ticks: Ticks) -> None:
    write(ticks.models, NIGHTLY, source={"uri": "hf://org/tiny", "revision": "main"})
    ticks.watch()
    with listening() as webhook:
        ticks.settings = replace(ticks.settings, hub_endpoint="http://127.0.0.1:9", webhook=webhook.url)
        done = ticks.night()
        assert webhook.texts == []  # whoever is slow to hear of it delays no release
        automation.notification_sensor(build_sensor_context(resources={"settings": ticks.settings}))
    assert done.run_requests == []
    assert [text.splitlines()[0] for text in webhook.texts] == [
        "demo|awq can't be checked for changes", "demo|gptq can't be checked for changes",
    ]  # fmt: skip
    assert "can't reach the hub at http://127.0.0.1:9" in str(done.skip_message)


def test_the_rescan_and_the_load_test_are_of_champions_whose_files_ask(
    ticks: Ticks, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(ticks.models, {"rescan": "nightly", "load": "weekly"})
    ticks.models.write("other")
    ticks.watch()
    held = [champion(name) for name in ("demo-awq", "other-awq", "gone-awq")]
    monkeypatch.setattr(automation, "champions", lambda _: held)
    (rescan,) = ticks.night("nightly_rescan").run_requests or ()
    assert rescan.run_config == {"ops": {"release_rescan": {"config": {"lines": ["demo-awq"]}}}}
    assert defs.resolve_job_def("rescan_champions").graph.node_named("release_rescan")
    (load,) = ticks.night("weekly_load").run_requests or ()
    assert (load.partition_key, load.tags["dagster/priority"]) == ("demo|awq", "-10")


def test_the_cursor_is_small(ticks: Ticks) -> None:
    write(ticks.models, ON_CHANGE)
    ticks.watch()
    assert set(json.loads(ticks.cursor or "")) == {"models", "schemes", "touched"}
