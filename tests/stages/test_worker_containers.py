"""Workers in real containers: what they see of the machine, how they fail, and that none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docker
import pytest

from checkout import CHECKOUT
from containers.engine.owner import home_digest
from containers.sandbox import sandbox
from pipeline.errors import WorkerFailed
from pipeline.settings import Settings
from pipeline.workers.launchers.configured import launcher
from pipeline.workers.runner import Workers
from stages.test_ray import ENVIRONMENT, RUN, wait_for, write

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def variables(tmp_path: Path, home: dict[str, str]) -> dict[str, str]:
    (tmp_path / "workers.yaml").write_text("launcher: container\nmemory: 256MiB\n")
    return {**home, "AWS_SECRET_ACCESS_KEY": "secret", "SLIPWAY_WORKERS": str(tmp_path / "workers.yaml")}


@pytest.fixture
def run(tmp_path: Path, variables: dict[str, str]) -> Run:
    settings = Settings.read(variables)
    folder = tmp_path / "folder"
    folder.mkdir()

    def run(body: str, **request: object) -> dict[str, Any]:
        script = write(tmp_path / "script" / "s.py", body)
        return Workers(settings, print, launcher=launcher(settings, print))(ENVIRONMENT, script, request, folder)

    (tmp_path / "script").mkdir()
    return run


def left(engine: docker.DockerClient, settings: Settings) -> list[str]:
    label = f"slipway.home={home_digest(settings.home)}"
    return [str(found.name) for found in engine.containers.list(all=True, filters={"label": label})]


def test_a_worker_sees_what_it_reads_and_no_network_and_no_secret(
    run: Run, tmp_path: Path, engine: docker.DockerClient, settings: Settings
) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    output.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "text.txt").write_text("text")
    (source / "text.txt").symlink_to(tmp_path / "elsewhere" / "text.txt")  # as a view of a source has it
    (tmp_path / "hidden.txt").write_text("hidden")
    body = f"""
        Path(request["output"], "o.txt").write_text(Path(request["source"], "text.txt").read_text().upper())
        refused = []
        for path in (Path(request["source"], "new"), Path("/etc/new"), Path(__file__).with_name("new")):
            try:
                path.write_text("x")
            except OSError as error:
                refused.append(error.errno)
        return {{"refused": refused, "hidden": Path({str(tmp_path / "hidden.txt")!r}).exists(),
                "interfaces": os.listdir("/sys/class/net"), "names": sorted(os.environ)}}
    """
    seen = run(body, source=source, output=output)
    assert (output / "o.txt").read_text() == "TEXT"
    assert seen["refused"] == [30, 30, 30]  # a read-only file system
    assert not seen["hidden"]
    assert seen["interfaces"] == ["lo"]
    assert "AWS_SECRET_ACCESS_KEY" not in seen["names"]
    assert left(engine, settings) == []


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("raise WorkerError('no GPU here')", "no GPU here"),
        ("return 1 / 0", "(?s)ended with status 1.*ZeroDivisionError"),
        ("bytearray(1 << 30)[::4096] = b'x' * (1 << 18)\nreturn {}", r"was killed \(by hand, or the machine ran out"),
    ],
)
def test_how_it_failed_is_told_as_if_it_had_run_here(
    run: Run, body: str, told: str, engine: docker.DockerClient, settings: Settings
) -> None:
    with pytest.raises(WorkerFailed, match=told):
        run(body)
    assert left(engine, settings) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_container_outlives_its_run(
    variables: dict[str, str], tmp_path: Path, engine: docker.DockerClient, settings: Settings, number: signal.Signals
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    script = write(tmp_path / "s.py", f"Path({str(folder / 'pid')!r}).write_text('1')\ntime.sleep(600)")
    command = [sys.executable, "-c", RUN, ENVIRONMENT, str(script), str(folder)]
    process = subprocess.Popen(command, env=variables, cwd=CHECKOUT)
    wait_for(folder / "pid")
    os.kill(process.pid, number)
    process.wait(120)
    if number == signal.SIGKILL:
        assert len(sandbox.sweep(engine, settings.home)) == 1
    assert left(engine, settings) == []
