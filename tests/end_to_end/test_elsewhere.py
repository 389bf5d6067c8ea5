"""A release whose workers run on a cluster, whose files go through object storage and whose runs are in PostgreSQL."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import psycopg2
import pytest
from ray_cluster import Cluster, ray_cluster
from real_server import AWS, BUCKET, postgres, s3_server

from homes import Slipway, make_home
from pipeline.settings import Settings
from pipeline.store.artifacts import Store
from pipeline.store.materializations import MaterializationIndex
from registry.objects import digest_local

# What names the hour, or what was measured in it.
DATED = {
    "release/report.html",
    *(
        f"release/evidence/{name}"
        for name in (
            "drift.json", "scan.json", "trivy.json", "sbom.cdx.json", "mlbom.cdx.json", "load.json", "memory.json",
            "requests.jsonl", "cost.json",
        )
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Elsewhere:
    """The command in a home of its own, on engines that others run."""

    slipway: Slipway
    cluster: Cluster
    database: str
    s3: str


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, machine: Settings, slipway: Slipway) -> Iterator[Elsewhere]:
    folder = tmp_path_factory.mktemp("elsewhere")
    home = make_home(folder / "home", machine)
    lend_baseline(slipway, folder / "home")
    with (
        tempfile.TemporaryDirectory(prefix="slipway-postgres-") as open_folder,
        s3_server(folder) as address,
        ray_cluster(folder, machine, s3 := {**AWS, "AWS_ENDPOINT_URL": address}) as cluster,
    ):
        Path(open_folder).chmod(0o755)
        with postgres(Path(open_folder), "dagster") as server:
            configured = {
                **home, **s3, "SLIPWAY_DAGSTER_POSTGRES": f"{server}/dagster",
                "SLIPWAY_WORKERS": str(cluster.workers(folder / "workers.yaml", f"s3://{BUCKET}/artifacts")),
                "SLIPWAY_ARTIFACTS": f"s3://{BUCKET}/artifacts",
            }  # fmt: skip
            yield Elsewhere(Slipway(configured), cluster, f"{server}/dagster", address)


def lend_baseline(slipway: Slipway, home: Path) -> None:
    """Give a home what FP16 answered in another: a server of this machine is asked that wherever workers run."""
    settings = Settings.read(dict(slipway.variables))
    store, place = Store(settings.home / "artifacts"), MaterializationIndex(settings).read("baseline", "demo|gptq")
    assert place is not None
    found = store.find(*place)
    assert found is not None
    folder = found.folder.parent
    shutil.copytree(folder, home / "artifacts" / folder.relative_to(store.root))


def manifest(slipway: Slipway, folder: Path) -> dict[str, Any]:
    assert slipway("pull", "demo-gptq", folder).returncode == 0
    found: dict[str, Any] = json.loads((folder / "release" / "manifest.json").read_text())
    return found


def undated(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest without what another hour gives: its date, what load was measured, and digests of what says either."""
    files = {name: None if name in DATED else record for name, record in manifest["files"].items()}
    gates = []
    for gate in manifest["gates"]:
        verdict = dict(gate["verdict"])
        # How far the engine was from itself when it was asked twice: 0.0 in most hours, 2e-7 nats in others.
        verdict["metrics"] = {
            name: value for name, value in verdict["metrics"].items() if not name.endswith(".floor_nats")
        }
        if verdict["gate"] == "load":
            verdict |= {"metrics": None, "reason": None}
        evidence = {name: None if name in DATED else digest for name, digest in gate["evidence"].items()}
        gates.append({"verdict": verdict, "evidence": evidence})
    return {**manifest, "created": None, "files": files, "gates": gates, "sbom": None, "mlbom": None}


def answers(folder: Path) -> dict[str, Any]:
    """What was asked and answered, every item, without how far the engine was from itself."""
    found: dict[str, Any] = json.loads((folder / "release" / "evidence" / "drift.json").read_text())
    for task in found["tasks"].values():
        task["again"] = None
    return found


def test_it_equals_the_one_that_was_made_here(
    slipway: Slipway, released: dict[str, Any], elsewhere: Elsewhere, tmp_path: Path
) -> None:
    done = elsewhere.slipway("release", "demo", "--scheme", "gptq", "--json")
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads(done.stdout)["releases"]
    assert entry["outcome"] == "promoted"
    assert {stage["name"] for stage in entry["stages"] if stage["cached"]} <= {"baseline"}
    here, there = manifest(slipway, tmp_path / "here"), manifest(elsewhere.slipway, tmp_path / "there")
    assert here["created"] != there["created"]
    assert undated(here) == undated(there)
    assert answers(tmp_path / "here") == answers(tmp_path / "there")


def test_what_could_run_elsewhere_did(elsewhere: Elsewhere) -> None:
    """After the release above: both workers that need no server of this machine, on the second node."""
    jobs = httpx.get(f"{elsewhere.cluster.address}/api/jobs/", trust_env=False).json()
    assert {(job["metadata"]["slipway.script"], job["status"]) for job in jobs if job["type"] == "SUBMISSION"} == {
        ("gptqmodel", "SUCCEEDED"), ("layers", "SUCCEEDED"),
    }  # fmt: skip
    first, second = elsewhere.cluster.homes
    assert not (first / "scratch").exists()
    assert list((second / "scratch").iterdir()) == []


def test_the_weights_are_in_object_storage_by_digest_and_other_homes_can_have_them(elsewhere: Elsewhere) -> None:
    key = {"aws_access_key_id": "k", "aws_secret_access_key": "s"}
    client = boto3.client("s3", endpoint_url=elsewhere.s3, region_name="us-east-1", **key)
    stored = {item["Key"] for item in client.list_objects_v2(Bucket=BUCKET)["Contents"]}
    for stage in ("source", "quantized"):
        (weights,) = (elsewhere.slipway.home / "artifacts" / stage).glob("*/files/model.safetensors")
        assert f"artifacts/sha256/{digest_local(weights)}" in stored
        assert f"artifacts/artifacts/{stage}/{weights.parent.parent.name}.json" in stored


def test_the_run_and_what_its_workers_reported_are_in_the_database(elsewhere: Elsewhere) -> None:
    with (
        closing(psycopg2.connect(elsewhere.database.replace("+psycopg2", ""))) as database,
        database.cursor() as cursor,
    ):
        cursor.execute("SELECT status FROM runs")
        assert cursor.fetchall() == [("SUCCESS",)]
        cursor.execute("SELECT count(*) FROM event_logs WHERE event LIKE '%4 of 4 layers%'")
        assert cursor.fetchone() != (0,)
    assert not list(elsewhere.slipway.home.glob("dagster/**/*.db"))
