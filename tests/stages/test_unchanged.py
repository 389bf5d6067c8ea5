"""A release that is as it was is told without a run, against a real MLflow; and what makes a run necessary."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import docker
import pytest

from pipeline.orchestration.release_events import GateJudged, RunEnded, RunEvent, StageDone, StageProgress
from pipeline.orchestration.unchanged import unchanged
from pipeline.settings import Settings
from pipeline.spec import ModelSpec
from pipeline.stages import scan
from pipeline.stages.context import StageContext
from pipeline.stages.metadata import ReleasedVersion
from pipeline.stages.promotion import promote
from pipeline.stages.table import BY_NAME
from pipeline.store.materializations import MaterializationIndex
from pipeline.trust import signing_key, trust_of
from registry import promote_version, rollback
from registry.catalog import current
from unit.pipeline.filled import FillingContext, Models, release


class Released:
    """A home in which the demo's GPTQ was released, by stand-ins for its workers and its engine."""

    def __init__(self, folder: Path) -> None:
        models = Models(folder)
        self.settings = models.settings
        schemes = {"gptq": {"method": "gptq", "backend": "gptqmodel", "bits": 4, "group_size": 64}}
        self.spec = models.write(schemes=schemes)
        self.release(self.spec)

    def release(self, spec: ModelSpec, lost: int = 1) -> None:
        """As a run does: each asset's handle is written when it is made, the release's after its promotion."""
        MaterializationIndex(self.settings).begin("demo|gptq")
        context = FillingContext(spec, "gptq", self.settings, lambda _: None, lost=lost)
        for name, found in release(context).items():
            if name == "release":
                promote(context, found)
            MaterializationIndex(self.settings).write(name, "demo|gptq", (found.stage, found.key))

    def release_another(self) -> ModelSpec:
        """Release what another calibration comes to, as a candidate; return its file."""
        calibration = self.spec.calibration.model_copy(update={"samples": 16})
        by_hand = self.spec.registry.model_copy(update={"champion": "manual"})
        another = self.spec.model_copy(update={"calibration": calibration, "registry": by_hand})
        self.release(another, lost=2)
        return another


@pytest.fixture
def has_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of an engine, for no image was built."""
    monkeypatch.setattr(StageContext, "has_image", lambda *_: True)


@pytest.fixture(scope="module")
def at_first(tmp_path_factory: pytest.TempPathFactory) -> Released:
    return Released(tmp_path_factory.mktemp("released"))


@pytest.fixture
def released(at_first: Released, tmp_path: Path, has_every_image: None) -> Released:
    """A copy of the home as it was at first: to be looked at, for what is registered lies where it lay."""
    copied = copy.copy(at_first)
    home = tmp_path / "home"
    shutil.copytree(at_first.settings.home, home, symlinks=True)
    copied.settings = Settings.read({"SLIPWAY_HOME": str(home), "SLIPWAY_MODELS": str(at_first.settings.models)})
    return copied


def test_what_is_as_it_was_is_told_as_its_run_would_tell_it(released: Released) -> None:
    events = unchanged(released.spec, "gptq", released.settings)
    assert events is not None
    done = [event for event in events if isinstance(event, StageDone)]
    assert [event.name for event in done] == list(BY_NAME)
    assert all(event.cached and event.worker_seconds == 0 for event in done)
    gates = [(event.name, event.blocks) for event in events if isinstance(event, GateJudged)]
    assert gates == [("drift", False), ("scan", False), ("load", False)]
    (version,) = current(released.settings.tracking_uri, "demo-gptq")
    told = released_in(events)
    assert (told.version, told.manifest_digest) == (version.version, version.manifest_digest)
    assert (told.aliases, told.outcome) == (("candidate", "champion"), "up-to-date")


def test_a_run_is_needed_where_the_engine_has_lost_the_image(
    released: Released, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StageContext, "has_image", lambda *_: False)
    assert unchanged(released.spec, "gptq", released.settings) is None


def test_a_run_is_needed_where_no_engine_answers(released: Released, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    nowhere = replace(released.settings, docker_host="unix:///nowhere.sock")
    assert unchanged(released.spec, "gptq", nowhere) is None


def test_a_run_is_needed_for_a_newer_vulnerability_database(
    released: Released, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = scan.trivy.database(released.settings.home)
    monkeypatch.setattr(scan.trivy, "database", lambda _: replace(real, digest="sha256:new"))
    assert unchanged(released.spec, "gptq", released.settings) is None


def test_a_run_is_needed_where_a_gate_refuses(released: Released) -> None:
    slo = released.spec.load.slo.model_copy(update={"p95_latency_ms": 1.0})
    limited = released.spec.load.model_copy(update={"slo": slo})
    assert unchanged(released.spec.model_copy(update={"load": limited}), "gptq", released.settings) is None


def test_a_run_is_needed_where_the_engine_is_damaged(released: Released, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bool:
        raise docker.errors.APIError("500 Server Error")

    monkeypatch.setattr(StageContext, "has_image", broken)
    assert unchanged(released.spec, "gptq", released.settings) is None


def test_a_run_is_needed_where_the_images_registry_has_lost_it(released: Released) -> None:
    (record,) = (released.settings.home / "artifacts" / "release").glob("*/files/release/evidence/image.json")
    pushed = record.read_text().replace('"pushed":false', '"pushed":true ')
    record.chmod(0o644)
    record.write_text(pushed.replace("slipway/demo-gptq@", "127.0.0.1:9/image@"))
    assert unchanged(released.spec, "gptq", released.settings) is None


def test_a_run_is_needed_where_there_is_no_lock_and_none_is_written(released: Released) -> None:
    kept = released.spec.lock.read_bytes()
    released.spec.lock.unlink()
    try:
        assert unchanged(released.spec, "gptq", released.settings) is None
        assert not released.spec.lock.exists()
    finally:
        released.spec.lock.write_bytes(kept)


def test_a_run_is_needed_behind_one_that_did_not_get_to_its_end(released: Released) -> None:
    MaterializationIndex(released.settings).begin("demo|gptq")
    assert unchanged(released.spec, "gptq", released.settings) is None


@pytest.mark.parametrize("stage", ["quantized", "release"])
def test_a_run_is_needed_where_dagster_last_saw_something_else(released: Released, stage: str) -> None:
    MaterializationIndex(released.settings).write(stage, "demo|gptq", (stage, "0" * 64))
    assert unchanged(released.spec, "gptq", released.settings) is None


def test_a_run_is_needed_where_the_aliases_are_others_than_the_file_wants_and_not_where_a_person_moved_them(
    tmp_path: Path, has_every_image: None
) -> None:
    released = Released(tmp_path)
    settings = released.settings
    registry = settings.tracking_uri, trust_of(settings)
    candidate = released.release_another()
    champion = candidate.model_copy(update={"registry": released.spec.registry})
    assert unchanged(champion, "gptq", settings) is None
    assert aliases(unchanged(candidate, "gptq", settings)) == ["candidate"]

    promote_version("demo-gptq", "2", *registry, key=signing_key(settings))
    assert aliases(unchanged(champion, "gptq", settings)) == ["candidate", "champion"]
    rollback("demo-gptq", *registry, key=signing_key(settings))
    events = unchanged(champion, "gptq", settings)
    assert aliases(events) == ["candidate", "previous"]
    told = [event.text for event in events or () if isinstance(event, StageProgress)]
    assert any("a person has replaced it" in text for text in told)


def aliases(events: list[RunEvent] | None) -> list[str]:
    return list(released_in(events).aliases)


def released_in(events: list[RunEvent] | None) -> ReleasedVersion:
    assert events is not None
    last = events[-1]
    assert isinstance(last, RunEnded)
    assert last.release is not None
    assert last.outcome == last.release.outcome
    return last.release
