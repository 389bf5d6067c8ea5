"""Load tests outside of a release: which line is meant, which traffic, and how it is shown while it runs."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import load_evidence
import pytest
import yaml
from click.testing import CliRunner
from image_record import image_record

from containers.errors import SandboxError, UnhealthyError
from containers.hardware import gpu
from containers.sandbox import sandbox
from evals.load import load_test as loads
from evals.load.comparison import ComparisonRow
from evals.load.load_test import TrafficProgress
from evals.load.plan import LoadPlan
from homes import DEMO
from pipeline.commands import loading as commands
from pipeline.commands.loading import Figures, _figures
from pipeline.errors import SpecError
from pipeline.operations import load_tests
from pipeline.settings import Settings
from pipeline.spec import load
from pipeline.stages.answers import serve_image
from pipeline.stages.context import StageContext
from pipeline.stages.load import measure
from pipeline.store.artifacts import Artifact
from registry.verdict import Status, Verdict

GOING = TrafficProgress.model_validate({
    "purpose": "chat", "rate": 4.0, "phase": "load", "total": 480, "answered": 12, "errors": 0, "elapsed_s": 3.2,
    "tokens_per_second": 96.4, "p50_latency_ms": 80.2, "p95_latency_ms": 120.0, "p95_ttft_ms": None,
})  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(DEMO.with_suffix(".yaml"), models)
    (models / "demo").symlink_to(DEMO)
    return Settings.read({"SLIPWAY_HOME": str(tmp_path / "home"), "SLIPWAY_MODELS": str(models)})


def demo(**changes: Any) -> LoadPlan:  # noqa: ANN401 - YAML
    document = yaml.safe_load(DEMO.with_suffix(".yaml").read_text())["load"]
    return LoadPlan.model_validate({**document, **changes})


@pytest.mark.parametrize("scheme", ["awq", "gptq", "fp16"])
def test_a_release_line_is_found_by_its_name_and_so_is_what_it_was_made_from(settings: Settings, scheme: str) -> None:
    spec, found = load_tests.find(f"demo-{scheme}", settings)
    assert (spec.model, found) == ("demo", scheme)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("demo-aqw", "did you mean `demo-awq`"), ("other", "there are `demo-awq`, `demo-gptq`, `demo-fp16`")],
)
def test_an_unknown_line_is_answered_with_a_near_one_or_all(settings: Settings, name: str, hint: str) -> None:
    with pytest.raises(SpecError, match=f"`{name}`: {hint}"):
        load_tests.find(name, settings)


def test_another_profile_comes_as_it_is_and_keeps_the_models_limits() -> None:
    own = demo(request_rate=9, input_tokens=32)
    (profile,) = load_tests.changed(own, ["chat"], {}).traffic
    assert (profile.name, profile.rate, profile.input_tokens.median) == ("chat", 4, 120)
    assert (profile.slo.p95_latency_ms, profile.slo.p95_ttft_ms) == (own.slo.p95_latency_ms, own.slo.p95_ttft_ms)


def test_the_models_own_profile_keeps_what_was_changed_of_it() -> None:
    own = demo(profiles={"quick": {"output_tokens": 8}}, request_rate=9)
    for profiles in ([], ["quick"]):
        (profile,) = load_tests.changed(own, profiles, {"seconds": 3.0}).traffic
        assert (profile.rate, profile.seconds, profile.output_tokens.median) == (9, 3, 8)


def test_the_command_lines_rate_goes_over_the_profiles() -> None:
    plan = load_tests.changed(demo(), ["burst"], {"request_rate": 2.0, "capacity": {}, "faults": True})
    assert plan.traffic[0].rate == 2
    assert plan.search is not None
    assert "faults_failed" in plan.limits()


def test_what_was_typed_wins_over_what_the_file_says_of_one_profile() -> None:
    own = demo(profiles={"quick": {"request_rate": 7, "seconds": 40, "output_tokens": 8}})
    for profiles in ([], ["quick"]):
        (profile,) = load_tests.changed(own, profiles, {"request_rate": 2.0, "seconds": 3.0}).traffic
        assert (profile.rate, profile.seconds, profile.output_tokens.median) == (2, 3, 8)


def test_a_search_that_is_asked_for_is_the_files_own() -> None:
    own = demo(capacity={"max_rate": 20, "step_seconds": 5})
    for asked, seconds in (({}, 5), ({"step_seconds": 9.0}, 9)):
        search = load_tests.changed(own, [], {"capacity": asked}).search
        assert search is not None
        assert (search.max_rate, search.step_seconds) == (20, seconds)
    assert load_tests.changed(own, [], {"capacity": None}).search is None


def test_one_of_several_profiles_keeps_what_the_file_says_of_all() -> None:
    own = demo(profiles=["quick", "chat"], request_rate=9, output_tokens=8)
    (profile,) = load_tests.changed(own, ["quick"], {}).traffic
    assert (profile.rate, profile.output_tokens.median) == (9, 8)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Artifact:
    """A checkpoint of which only the configuration is read."""
    folder = tmp_path / "quantized"
    folder.mkdir()
    shutil.copy(DEMO / "model" / "config.json", folder)
    return Artifact("quantized", "0", "0", folder, {}, {}, {}, 0.0, 0.0, "", cached=True)


def test_an_image_that_needs_a_gpu_is_not_started_where_there_is_none(
    settings: Settings, checkpoint: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "gpus", list)
    settings.home.mkdir()
    spec = load(DEMO.with_suffix(".yaml"))
    record = image_record(minimum_driver="580.65.06")
    context = StageContext(spec, "awq", settings, print)
    found = measure(context, spec.load, record, checkpoint, tmp_path, tmp_path)
    assert loads.judge(found, spec.load).cause == "no-gpu"


def test_load_tests_and_evaluations_hold_their_servers_to_the_cpu_of_the_settings(
    settings: Settings, checkpoint: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []

    def serve(*_: object, cpu_limit: str | None = None, **more: object) -> None:
        limits.append(cpu_limit)
        raise UnhealthyError("not started here")

    monkeypatch.setattr(sandbox, "serve", serve)
    monkeypatch.setattr(StageContext, "engine", lambda _: contextlib.nullcontext())
    settings.home.mkdir()
    settings = replace(settings, cpu_limit="avx2", locks=tmp_path)
    spec = load(DEMO.with_suffix(".yaml"))
    context = StageContext(spec, "awq", settings, print)
    measure(context, spec.load, image_record(), checkpoint, tmp_path, tmp_path)
    with pytest.raises(SandboxError), serve_image(context, "sha256:1", checkpoint):
        pass
    assert limits == ["avx2", "avx2"]


def test_the_price_is_the_models_own() -> None:
    spec = load(DEMO.with_suffix(".yaml"))
    assert spec.cost is not None
    assert load_tests.price_per_hour(spec) == spec.cost.cloud.dollars_per_hour  # type: ignore[union-attr]
    assert load_tests.price_per_hour(spec.model_copy(update={"cost": None})) is None


def test_live_figures_say_what_there_is() -> None:
    line = _figures(GOING)
    assert "12/480 answered, p50 80 ms, p95 120 ms, 96 tokens/s" in line
    assert "errors" not in line
    assert "3 errors" in _figures(GOING.model_copy(update={"errors": 3}))


def test_without_a_terminal_a_line_comes_every_few_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    with Figures() as live:
        for answered in range(50):
            live(GOING.model_copy(update={"answered": answered}))
        live(GOING.model_copy(update={"phase": "done"}))
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(("status", "left"), [("pass", 0), ("fail", 3), ("inconclusive", 3)])
def test_a_scheme_that_misses_its_limits_ends_the_commands_with_3(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: Status, left: int
) -> None:
    verdict = Verdict(gate="load", status=status, reason="as this test says", cause="client-late")
    good = Verdict(gate="load", status="pass", reason="all limits were met")
    rows, page = [ComparisonRow(name="FP16", size_bytes=1)], tmp_path / "page.html"
    measured = load_tests.LoadTestResult("demo-awq", verdict, load_evidence.measured(), tmp_path, page)
    monkeypatch.setattr(load_tests, "compare", lambda *_: (rows, {"fp16": good, "awq": verdict}, page))
    monkeypatch.setattr(load_tests, "load_now", lambda *_: measured)
    environment = {"SLIPWAY_HOME": str(settings.home), "SLIPWAY_MODELS": str(settings.models)}
    for command, name in ((commands.compare, "demo"), (commands.load, "demo-awq")):
        done = CliRunner().invoke(command, [name], env=environment)
        assert done.exit_code == left, done.output
        assert "as this test says" in done.output
