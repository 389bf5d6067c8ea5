"""Dagster's runs in a real PostgreSQL, by the setting alone, shared by two homes; and one that is not there."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from dagster import DagsterRunStatus
from real_server import free_port, postgres

from pipeline.errors import SettingsError
from pipeline.orchestration.instance import fail_orphaned_runs, open_instance
from pipeline.settings import Settings
from unit.pipeline.test_instance import carry, end, holders, start_run

pytestmark = pytest.mark.usefixtures("instance_variables")


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="slipway-postgres-") as name:
        Path(name).chmod(0o755)
        with postgres(Path(name), "dagster") as address:
            yield f"{address}/dagster"


def settings(home: Path, address: str) -> Settings:
    return Settings.read({"SLIPWAY_HOME": str(home), "SLIPWAY_DAGSTER_POSTGRES": address})


def test_two_homes_share_runs_and_slots_and_bury_their_own_dead_alone(tmp_path: Path, database: str) -> None:
    here, there = settings(tmp_path / "here", database), settings(tmp_path / "there", database)
    with open_instance(here) as instance:
        run_id = start_run(instance)
        end(carry(run_id, here), signal.SIGKILL)
    with open_instance(there) as instance:
        assert holders(instance) == {run_id}
        # Whether a process of another machine lives can't be seen from here.
        assert fail_orphaned_runs(instance, there) == []
    with open_instance(here) as instance:
        assert fail_orphaned_runs(instance, here) == [run_id]
        buried = instance.get_run_by_id(run_id)
        assert buried is not None
        assert buried.status == DagsterRunStatus.FAILURE
        assert holders(instance) == set()
    assert not list(tmp_path.rglob("*.db"))


def test_a_database_that_is_not_there_is_named_without_its_password(tmp_path: Path) -> None:
    address = f"postgresql://slipway:secret@127.0.0.1:{free_port()}/dagster"
    refused = pytest.raises(SettingsError, match=r"127\.0\.0\.1.*refused.*SLIPWAY_DAGSTER_POSTGRES")
    with refused as raised, open_instance(settings(tmp_path / "home", address)):
        pass
    assert "secret" not in str(raised.value)
