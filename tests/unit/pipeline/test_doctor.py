"""What the doctor finds on machines that lack something."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from containers.scan import trivy
from pipeline.operations.doctor import Finding, examine
from pipeline.settings import Settings
from pipeline.workers.environments import ENVIRONMENTS, environment_folder


def look(home: Path, **variables: str) -> dict[str, Finding]:
    """Findings by part, on a machine without an engine unless ``variables`` name one."""
    settings = Settings.read({"SLIPWAY_HOME": str(home), "DOCKER_HOST": f"unix://{home}/none.sock", **variables})
    return {finding.part: finding for finding in examine(settings)}


@pytest.fixture
def server() -> Iterator[str]:
    """The address of something that listens."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


def test_every_part_is_looked_at_and_nothing_is_changed(tmp_path: Path) -> None:
    found = look(tmp_path / "home")
    workers = [f"worker {name}" for name in ENVIRONMENTS]
    assert list(found) == ["engine", "cpu", "gpu", "trivy", "trivy database", "disk", *workers, "mlflow"]
    assert not (tmp_path / "home").exists()


def test_what_is_not_well_has_a_remedy(tmp_path: Path) -> None:
    assert all(finding.remedy for finding in look(tmp_path).values() if finding.status != "ok")


def test_no_engine_is_missing_with_where_it_was_looked_for(tmp_path: Path) -> None:
    engine = look(tmp_path)["engine"]
    assert engine.status == "missing"
    assert f"{tmp_path}/none.sock" in engine.found
    assert "doctor --fix" in engine.remedy


def test_no_vulnerability_database_is_a_warning(tmp_path: Path) -> None:
    database = look(tmp_path)["trivy database"]
    assert database.status == "warning"
    assert "absent" in database.found
    assert "SLIPWAY_TRIVY_DATABASE" in database.remedy


def test_the_pinned_trivy_is_there(tmp_path: Path) -> None:
    found = look(tmp_path)["trivy"]
    assert found.status == "ok"
    assert found.found.startswith(trivy.VERSION)


def test_an_environment_is_made_or_will_be(tmp_path: Path) -> None:
    environment_folder("lm-eval", tmp_path).mkdir(parents=True)
    found = look(tmp_path)
    assert found["worker lm-eval"].status == "ok"
    assert found["worker autoawq"].status == "warning"


def test_the_disk_is_that_of_the_home_even_before_it_exists(tmp_path: Path) -> None:
    disk = look(tmp_path / "not" / "yet")["disk"]
    assert f"free for {tmp_path}/not/yet" in disk.found


def test_the_embedded_registry_needs_nothing(tmp_path: Path) -> None:
    assert look(tmp_path)["mlflow"] == Finding("mlflow", "ok", f"sqlite:///{tmp_path}/mlflow/mlflow.db")


def test_a_registry_that_answers_is_well_and_its_password_stays_secret(tmp_path: Path, server: str) -> None:
    found = look(tmp_path, MLFLOW_TRACKING_URI=f"http://user:secret@{server}/base")["mlflow"]
    assert found == Finding("mlflow", "ok", f"http://{server}/base")


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("http://user:secret@127.0.0.1:9/", "no MLflow server answers"),
        ("http://[::1]:9", "no MLflow server answers"),
        ("http://127.0.0.1:http", "http://127.0.0.1:http"),
    ],
)
def test_a_registry_that_does_not_answer_is_missing(tmp_path: Path, uri: str, words: str) -> None:
    found = look(tmp_path, MLFLOW_TRACKING_URI=uri)["mlflow"]
    assert found.status == "missing"
    assert words in found.found
    assert "secret" not in found.found


@pytest.mark.parametrize(
    ("flags", "status", "told"),
    [
        ("fma f16c avx2 avx512f avx512bw avx512dq avx512vl avx512_bf16", "ok", "at full speed"),
        ("fma f16c avx2", "warning", "no AVX-512"),
        ("sse4_2", "missing", "no AVX2"),
    ],
)
def test_the_cpu_and_what_it_means_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, status: str, told: str
) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name\t: A CPU\nflags\t\t: {flags}\n")
    monkeypatch.setattr("containers.hardware.cpu._CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("pipeline.operations.doctor.gpus", list)
    found = look(tmp_path)["cpu"]
    assert (found.status, told in found.found, found.found.startswith("A CPU")) == (status, True, True)
    assert found.found.endswith("but `fp8-block`, `nvfp4`, `mxfp4`") == (status != "missing")
    assert look(tmp_path, DOCKER_HOST="ssh://elsewhere")["cpu"].status != "missing"
