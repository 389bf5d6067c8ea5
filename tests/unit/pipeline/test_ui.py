"""The servers of `slipway ui`: one pair a home, and no password where everybody on the machine can read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.serving import ui
from pipeline.serving.servers import ServerProcessError
from pipeline.settings import Settings
from registry.file_locks import locked


def test_a_home_that_is_served_is_not_served_twice(tmp_path: Path) -> None:
    settings = Settings.read({"SLIPWAY_HOME": str(tmp_path)})
    with locked(tmp_path / "ui.lock"), pytest.raises(ServerProcessError) as refused:
        ui.serve(settings, 3000, lambda _: None)
    assert str(refused.value).startswith(f"another `slipway ui` serves {tmp_path}: end it")
    assert list(tmp_path.iterdir()) == [tmp_path / "ui.lock"]


def test_a_tick_may_wait_for_hubs_that_do_not_answer(tmp_path: Path) -> None:
    server = ui._dagster(Settings.read({"SLIPWAY_HOME": str(tmp_path)}), 3000)
    for kind in ("SENSOR", "SCHEDULE"):
        assert server.environment[f"DAGSTER_{kind}_GRPC_TIMEOUT_SECONDS"] == "600"


def test_runs_link_to_the_port_that_is_served_unless_others_find_it_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mlflow() -> str:
        variables = ui._dagster(Settings.read({"SLIPWAY_HOME": str(tmp_path)}), 4000).environment
        return Settings.read({**variables, "SLIPWAY_HOME": str(tmp_path)}).mlflow_address

    monkeypatch.delenv("SLIPWAY_UI_ADDRESS", raising=False)
    assert mlflow() == "http://127.0.0.1:4001"
    monkeypatch.setenv("SLIPWAY_UI_ADDRESS", "https://slipway.example:8443")
    assert mlflow() == "https://slipway.example:8444"


def test_mlflows_store_is_no_argument_of_its_server(tmp_path: Path) -> None:
    address = "postgresql://ann:password@db/mlflow"
    server = ui._mlflow(Settings.read({"SLIPWAY_HOME": str(tmp_path), "MLFLOW_TRACKING_URI": address}), 3001)
    assert "password" not in " ".join(server.command)
    assert server.environment["MLFLOW_BACKEND_STORE_URI"] == address
