"""The log of runs: JSON lines with the run and the release, and no secret of the environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dagster import job, op

from pipeline.orchestration.instance import open_instance
from pipeline.settings import Settings


def test_every_line_of_a_run_names_it_and_its_release_and_no_secret_gets_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instance_variables: None
) -> None:
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://ann:pass%2Fword@db/mlflow")
    monkeypatch.setenv("SLIPWAY_PROXY_OF_A_TEST", "http://ann:pw@proxy:8080")

    def quantized(context) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001 - Dagster reads the annotation
        context.log.info("layer 1 of 4")
        context.log.warning("asked with hf_0123456789abcdef, refused")
        context.log.warning("no postgresql://ann:pass%2Fword@db/mlflow: FATAL pass/word via http://ann:pw@proxy, pw")
        context.log.debug("nobody's business")

    @job
    def small() -> None:
        op(quantized)()

    with open_instance(Settings.read()) as instance:
        done = small.execute_in_process(instance=instance, tags={"dagster/partition": "demo|gptq"})
    text = (tmp_path / "logs" / "runs.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert {(line["run_id"], line["job"], line["release"]) for line in lines} == {
        (done.run_id, "small", "demo|gptq")
    }  # fmt: skip
    said = [line for line in lines if "kind" not in line]
    assert [(line["stage"], line["level"], line["message"]) for line in said] == [
        ("quantized", "info", "layer 1 of 4"), ("quantized", "warning", "asked with ***, refused"),
        ("quantized", "warning", "no postgresql://ann***db/mlflow: FATAL *** via http://ann***proxy, pw"),
    ]  # fmt: skip
    assert "hf_0123456789abcdef" not in text
