"""`slipway ui`: what a person sees and launches in a browser, and that command line and UI see the same."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from browser import Browser, chromium
from checkout import CHECKOUT
from homes import DEMO, Slipway, forget
from pipeline.orchestration.instance import open_instance
from pipeline.settings import Settings
from pipeline.stages.table import STAGES
from ui_server import PATIENCE_SECONDS, RUNS, TERMINATE, Ui, processes_of, two_free_ports, workers_of


def litter() -> set[str]:
    """What is in the checkout, but for what tools keep there."""
    kept = {line.strip("/") for line in (CHECKOUT / ".gitignore").read_text().splitlines()}
    return {path.name for path in CHECKOUT.iterdir()} - kept


BEFORE = litter()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's file, for a test to change."""
    folder = tmp_path_factory.mktemp("models")
    write_demo(folder)
    return folder


def write_demo(models: Path, **slo: float) -> None:
    """Write the demo's file with some other limits; whatever was measured stands."""
    spec = yaml.safe_load(DEMO.with_suffix(".yaml").read_text().replace("file:demo/", f"file:{DEMO}/"))
    spec["load"]["slo"] |= slo
    (models / "demo.yaml").write_text(yaml.safe_dump(spec))


@pytest.fixture
def ui(slipway: Slipway, released: dict[str, Any], models: Path, instance_variables: None) -> Iterator[Ui]:
    with open_instance(Settings.read(dict(slipway.variables))) as instance:
        for scheme in {*instance.get_dynamic_partitions("scheme")} - {"awq", "gptq"}:
            instance.delete_dynamic_partition("scheme", scheme)  # another test's, of a file that is not in this folder
    found = Ui(Slipway({**slipway.variables, "SLIPWAY_MODELS": str(models)}))
    yield found
    if found.process.poll() is None:
        found.end(signal.SIGTERM)
    assert processes_of(slipway.home) == {}


def reads_what_was_made(browser: Browser) -> None:
    """Each asset explains itself, and links to the release's report."""
    for asset in ("drift", "scan", "load", "release"):
        browser.open(f"/assets/{asset}?partition=demo%7Cgptq")
        browser.sees("Owners", "ml-engineers", "Metadata")
        browser.picture(f"4-{asset}", documented="asset" if asset == "drift" else None)
        if asset in {"drift", "load"}:
            browser.shows_pictures()
            browser.picture(f"4-{asset}-pictures")
    # In MLflow, from the asset itself and from its version.
    browser.follows("release/report.html")
    browser.reads("accepted in the model's file")
    browser.picture("4-report", documented="report", part="iframe")
    browser.open("/assets/release?partition=demo%7Cgptq")
    browser.follows("/#/models/demo-gptq/versions/")
    browser.sees("The report")
    browser.picture("4-version", documented="version")
    browser.follows("The report")
    browser.reads("accepted in the model's file")


def test_a_person_launches_watches_reads_and_backfills_in_a_browser(
    slipway: Slipway, ui: Ui, models: Path, machine: Settings
) -> None:
    versions = slipway.aliases()["demo-gptq"]
    assert f"http://127.0.0.1:{ui.port}\n" in ui.announced()
    assert httpx.get(f"http://127.0.0.1:{ui.port + 1}/health", timeout=10, trust_env=False).status_code == 200
    with chromium(f"http://127.0.0.1:{ui.port}", machine.home / "test-artifacts" / "ui") as browser:
        browser.open("/asset-groups")
        browser.sees(*(stage.name for stage in STAGES))
        browser.picture("1-graph", documented="graph")

        # One partition, with something to do for as long as a page takes to open, and something new in the end, but
        # nothing that a browser's own work beside it would spoil.
        for stage in ("quantized", "scan"):
            forget(slipway, stage)
        run = browser.launch("gptq")
        browser.open(run)
        browser.sees("Executing (1)")
        browser.picture("2-live-logs")
        assert ui.wait(run.rpartition("/")[2], seconds=PATIENCE_SECONDS) == "SUCCESS"
        browser.sees("Success")
        browser.picture("3-promoted", documented="run")
        after = slipway.aliases()["demo-gptq"]
        (new,) = set(after) - set(versions)
        assert after[new] == ("candidate", "champion")

        reads_what_was_made(browser)

        # The same evidence against a limit that can't be met: refused in seconds, and said so where one looks first.
        write_demo(models, p95_latency_ms=1)
        refused = browser.launch("gptq")
        assert ui.wait(refused.rpartition("/")[2], seconds=PATIENCE_SECONDS) == "FAILURE"
        browser.open(refused)
        browser.filters_log("refuses")
        browser.sees("the load gate refuses: fail, p95_latency_ms")
        browser.picture("5-refused")
        browser.open("/assets/load?view=checks&checkDetail=load_gate")
        browser.sees("p95_latency_ms")
        browser.picture("5-refused-gate")
        write_demo(models)

        backfill = browser.launch(None)
        browser.open(backfill)
        browser.sees("100% completed")
        browser.picture("6-backfill")
    runs = ui(RUNS)["runsOrError"]["results"]
    of_backfill = {"key": "dagster/backfill", "value": backfill.rpartition("/")[2]}
    assert [run["status"] for run in runs if of_backfill in run["tags"]] == ["SUCCESS", "SUCCESS"]
    assert slipway.aliases()["demo-gptq"] == after

    # The command line beside it finds what the browser's runs made, and needs no run; where it does, that shows here.
    for forgotten, more in ((None, 0), ("release", 1)):
        if forgotten:
            forget(slipway, forgotten)
        beside = json.loads(slipway("release", "demo", "--scheme", "gptq", "--json").stdout)
        assert [entry["outcome"] for entry in beside["releases"]] == [("up-to-date", "promoted")[more]]
        assert len(ui(RUNS)["runsOrError"]["results"]) == len(runs) + more
    assert litter() == BEFORE
    assert ui.end(signal.SIGINT) == 0


@pytest.fixture
def unquantized(slipway: Slipway, released: dict[str, Any]) -> Iterator[None]:
    """The checkpoints are put aside, so that a run has a worker to start, and back."""
    there = slipway.home / "artifacts" / "quantized"
    aside = there.with_name("aside")
    there.rename(aside)
    yield
    shutil.rmtree(there, ignore_errors=True)
    aside.rename(there)


def test_a_terminated_run_leaves_no_worker_and_ending_the_servers_ends_their_runs(
    slipway: Slipway, unquantized: None, ui: Ui
) -> None:
    ui.announced()
    terminated = launch_and_wait_for_worker(ui, slipway)
    ui(TERMINATE, id=terminated)
    assert ui.wait(terminated, seconds=PATIENCE_SECONDS) == "CANCELED"
    assert workers_of(slipway.home) == {}

    cut_off = launch_and_wait_for_worker(ui, slipway)
    assert ui.end(signal.SIGTERM) == 0
    assert processes_of(slipway.home) == {}
    assert workers_of(slipway.home) == {}
    # What a person terminated stays so; what the end of the servers cut off is taken up at their next start.
    with open_instance(Settings.read(dict(slipway.variables))) as instance:
        run = instance.get_run_by_id(cut_off)
        assert run is not None
        assert run.is_failure
        assert run.tags["dagster/will_retry"] == "true"


def launch_and_wait_for_worker(ui: Ui, slipway: Slipway) -> str:
    run_id = ui.launch("awq")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not workers_of(slipway.home):
        assert time.monotonic() < deadline
        assert ui.status(run_id) not in {"SUCCESS", "FAILURE"}
        time.sleep(0.2)
    return run_id


@pytest.mark.parametrize("offset", [0, 1])
def test_a_taken_port_is_one_clear_line(slipway: Slipway, offset: int) -> None:
    port = two_free_ports()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port + offset))
        taken.listen()
        done = slipway("ui", "--port", str(port))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert str(port + offset) in line
    assert "--port" in line
    assert processes_of(slipway.home) == {}
