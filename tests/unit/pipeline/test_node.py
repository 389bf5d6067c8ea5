"""What a node that does remote jobs keeps on its disk: its own folder, and nothing of the dead."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dagster_pipes import DAGSTER_PIPES_CONTEXT_ENV_VAR, DAGSTER_PIPES_MESSAGES_ENV_VAR, decode_param

from checkout import CHECKOUT
from pipeline.workers.launchers import node
from pipeline.workers.launchers.node import own_folder

# A remote job in its middle, with a checkpoint's weights.
BUSY = """
import sys
from pathlib import Path
from pipeline.workers.launchers.node import own_folder

with own_folder(Path(sys.argv[1])) as folder:
    (folder / "model.safetensors").write_bytes(b"weights")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_remote_job_left_is_removed_by_the_next_and_one_that_goes_on_is_spared(tmp_path: Path) -> None:
    busy = [
        subprocess.Popen(
            [sys.executable, "-c", BUSY, str(tmp_path / "scratch")],
            cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    folders = []
    for process in busy:
        assert process.stdout is not None
        folders.append(Path(process.stdout.readline().strip()))
    busy[0].kill()
    busy[0].communicate()
    with own_folder(tmp_path / "scratch") as folder:
        assert not list(folder.iterdir())
        assert not folders[0].exists()
        assert (folders[1] / "model.safetensors").read_bytes() == b"weights"
    busy[1].communicate()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_a_worker_reports_is_passed_on_whole_and_from_its_own_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(DAGSTER_PIPES_CONTEXT_ENV_VAR, "context")
    (tmp_path / "other").write_text('{"stolen": 1}\n')
    with node._reporting(tmp_path) as variables:
        assert variables[DAGSTER_PIPES_CONTEXT_ENV_VAR] == "context"
        path = Path(decode_param(variables[DAGSTER_PIPES_MESSAGES_ENV_VAR])["path"])
        with path.open("a") as stream:
            stream.write('{"method": "log"}\n')
        path.unlink()
        path.symlink_to(tmp_path / "other")
    assert capfd.readouterr().out == '{"method": "log"}\n'


def test_where_nobody_follows_a_worker_reports_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DAGSTER_PIPES_CONTEXT_ENV_VAR, raising=False)
    with node._reporting(tmp_path) as variables:
        assert variables == {}
    assert list(tmp_path.iterdir()) == []


def test_a_setting_that_is_wrong_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPWAY_DISK_FLOOR", "much")
    monkeypatch.setattr(sys, "argv", ["node", "s3://artifacts/slipway", "a" * 64, "3"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match=r"^error: `SLIPWAY_DISK_FLOOR` is 'much': expected a size"):
            node.main()
    finally:
        signal.signal(signal.SIGTERM, before)
