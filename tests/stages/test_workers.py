"""Workers in their real environment: what they see, how they fail, and that they never outlive their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from worker_processes import of_script, wait_until_gone

from homes import FIRST_CALLS
from pipeline.errors import WorkerFailed
from pipeline.settings import Settings
from pipeline.workers.environments import ensure_environment, pins_digest
from pipeline.workers.runner import Workers

ENVIRONMENT = "aiperf"  # the lightest


def script(folder: Path, body: str) -> Path:
    path = folder / "script.py"
    lines = textwrap.indent(textwrap.dedent(body), "    ")
    path.write_text(
        f"import os, sys, time\nfrom slipway_worker import WorkerError, main\n"
        f"def work(request, report):\n{lines}\n"
        f"if __name__ == '__main__':\n    main(work)\n"
    )
    return path


def test_a_worker_gets_its_request_and_gives_its_result(tmp_path: Path, run_worker: Workers) -> None:
    result = run_worker(ENVIRONMENT, script(tmp_path, "return {'twice': request['n'] * 2}"), {"n": 21}, tmp_path)
    assert result == {"twice": 42}
    assert run_worker.seconds[0] > 0


def test_a_worker_sees_no_secret_and_not_our_packages(
    tmp_path: Path, home: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    settings = Settings.read({**home, "HF_TOKEN": "hf_secret", "AWS_SECRET_ACCESS_KEY": "aws_secret"})
    body = "import importlib.util as u\nreturn {'environment': dict(os.environ), 'ours': bool(u.find_spec('pipeline'))}"
    seen: Any = Workers(settings, print)(ENVIRONMENT, script(tmp_path, body), {}, tmp_path)
    assert not seen["ours"]
    assert "PYTHONPATH" not in seen["environment"]
    assert not [value for value in seen["environment"].values() if value in {"hf_secret", "aws_secret"}]
    assert seen["environment"]["PATH"].split(os.pathsep)[0].startswith(str(settings.home))


def test_what_torch_computes_first_is_as_exact_as_the_rest(settings: Settings) -> None:
    python = ensure_environment("gptqmodel", settings, print) / "bin" / "python"
    assert subprocess.check_output([python, FIRST_CALLS], text=True) == "0\n"


def test_an_expected_error_is_one_line(tmp_path: Path, run_worker: Workers) -> None:
    with pytest.raises(WorkerFailed, match=r"^no GPU here: use `gptqmodel` \(full output: .*\)$"):
        run_worker(ENVIRONMENT, script(tmp_path, "raise WorkerError('no GPU here: use `gptqmodel`')"), {}, tmp_path)


def test_a_crash_shows_the_last_output(tmp_path: Path, run_worker: Workers) -> None:
    with pytest.raises(WorkerFailed, match=r"(?s)ended with status 1.*ZeroDivisionError"):
        run_worker(ENVIRONMENT, script(tmp_path, "return 1 / 0"), {}, tmp_path)


def test_a_killed_worker_is_said_to_be_killed_and_leaves_no_result(tmp_path: Path, run_worker: Workers) -> None:
    with pytest.raises(WorkerFailed, match="was killed"):
        run_worker(ENVIRONMENT, script(tmp_path, "os.kill(os.getpid(), 9)"), {}, tmp_path)
    assert not (tmp_path / "result.json").exists()


def test_a_script_named_after_its_library_imports_the_library(tmp_path: Path, run_worker: Workers) -> None:
    path = script(tmp_path, "import aiperf\nreturn {'file': aiperf.__file__}").rename(tmp_path / "aiperf.py")
    assert "site-packages" in str(run_worker(ENVIRONMENT, path, {}, tmp_path)["file"])


def test_by_hand_it_reports_on_stderr(tmp_path: Path, settings: Settings) -> None:
    python = ensure_environment(ENVIRONMENT, settings, print) / "bin" / "python"
    (tmp_path / "request.json").write_text("{}")
    path = script(tmp_path, "report('layer 1 of 2')\nreturn {}")
    command: list[str | Path] = [
        python,
        path,
        "--request",
        tmp_path / "request.json",
        "--result",
        tmp_path / "result.json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == "layer 1 of 2\n"


def test_a_worker_dies_with_a_killed_parent(tmp_path: Path, settings: Settings, home: dict[str, str]) -> None:
    ensure_environment(ENVIRONMENT, settings, print)
    path = script(tmp_path, f"open({str(tmp_path / 'began')!r}, 'w').close()\ntime.sleep(600)")
    parent = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            (
                "import sys; from pathlib import Path; from pipeline.workers.runner import Workers;"
                "from pipeline.settings import Settings;"
                f"Workers(Settings.read(), print)({ENVIRONMENT!r}, Path(sys.argv[1]), {{}}, Path(sys.argv[2]))"
            ),
            *(path.rename(tmp_path / f"of_a_test_{os.getpid()}.py"), tmp_path),
        ],
        env=home,
    )
    worker = tmp_path / f"of_a_test_{os.getpid()}.py"
    deadline = time.monotonic() + 60
    while not (tmp_path / "began").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert of_script(worker)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_until_gone(worker)


def test_pins_that_cannot_be_met_say_so_and_leave_no_environment(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "build.txt").write_text("")
    (tmp_path / "broken.in").write_text("no-such-distribution-of-slipway\n")
    (tmp_path / "broken.txt").write_text("no-such-distribution-of-slipway==1.0 --hash=sha256:" + "0" * 64 + "\n")
    monkeypatch.setattr("pipeline.workers.environments.REQUIREMENTS", tmp_path)
    other = replace(settings, home=tmp_path / "home")
    with pytest.raises(WorkerFailed, match=r"(?s)can't make the broken environment.*no-such-distribution"):
        ensure_environment("broken", other, print)
    assert not [entry for entry in (tmp_path / "home" / "envs").iterdir() if entry.suffix != ".lock"]


def test_the_pins_digest_follows_the_pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.workers.environments.REQUIREMENTS", tmp_path)
    (tmp_path / "build.txt").write_text("")
    (tmp_path / "small.in").write_text("")
    (tmp_path / "small.txt").write_text("a==1\n")
    before = pins_digest("small")
    (tmp_path / "small.txt").write_text("a==2\n")
    assert pins_digest("small") != before
