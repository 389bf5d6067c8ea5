"""The command line as scripts and people meet it: statuses, streams, one-line errors, JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from release_folder import make_release

from homes import DEMO
from pipeline import cli
from pipeline.commands.releasing import exit_status, show_releases
from pipeline.commands.show import FAILED, REFUSED, USAGE
from pipeline.orchestration.release_events import SchemeResult
from registry.signing import load_or_create_key

Slipway = Callable[..., subprocess.CompletedProcess[str]]
COMMANDS = ["init", "plan", "release", "status", "pull", "verify", "report", "promote", "rollback", "canary", "history"]
COMMANDS += ["load", "compare", "bundle", "metrics", "image", "lock", "rescan", "doctor", "ui", "stop"]
COMMANDS += ["gc", "serve", "keys", "publish", "push"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def slipway(home: Path, tmp_path: Path) -> Slipway:
    """The command in an empty home, on a machine without an engine."""

    def run(*words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": os.environ["PATH"],
            "SLIPWAY_HOME": str(home),
            "DOCKER_HOST": f"unix://{tmp_path}/none.sock",
            **variables,
        }
        command = [str(Path(sys.executable).parent / "slipway"), *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def released(home: Path, tmp_path: Path) -> Path:
    """A release folder signed with the home's own key."""
    folder = tmp_path / "release"
    make_release(folder, load_or_create_key(home / "keys" / "release.pem"))
    return folder


def one_line(done: subprocess.CompletedProcess[str], status: int = FAILED) -> str:
    """The one line on stderr of a command that failed; nothing is on stdout."""
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_every_command_is_listed() -> None:
    assert sorted(cli.main.commands) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_does(command: str) -> None:
    done = CliRunner().invoke(cli.main, [command, "--help"])
    assert done.exit_code == 0
    described = done.output.split("\n\n")[1].strip()
    assert described[0].isupper()


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"image", "keys", "ui", "stop"}))
def test_every_command_with_a_result_has_json(command: str) -> None:
    assert "--json" in CliRunner().invoke(cli.main, [command, "--help"]).output


def test_help_imports_nothing_heavy() -> None:
    heavy = {"dagster", "mlflow", "numpy", "scipy", "docker", "pydantic", "cryptography", "pipeline.spec"}
    program = f"import sys, pipeline.cli; sys.exit(', '.join({heavy!r} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_status_and_verify_do_not_wait_for_mlflow_or_dagster() -> None:
    program = (
        "import sys\nfrom pipeline import spec\nfrom pipeline.orchestration import release\n"
        "from registry import catalog\n"
        "sys.exit(', '.join({'dagster', 'mlflow', 'scipy.stats', 'huggingface_hub'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_command_at_all_shows_the_help(slipway: Slipway) -> None:
    done = slipway()
    assert done.returncode == USAGE
    assert "Usage: slipway" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "words",
    [("relase",), ("release",), ("release", "demo", "--sheme", "awq"), ("pull", "demo-awq"), ("verify", "/nowhere")],
    ids=" ".join,
)
def test_a_wrong_command_line_is_usage(slipway: Slipway, words: tuple[str, ...]) -> None:
    done = slipway(*words)
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert done.stderr


def test_a_model_that_is_not_there_is_usage(slipway: Slipway) -> None:
    assert "did you mean `demo`?" in one_line(slipway("release", "dmeo"), USAGE)
    assert "no scheme `gtpq`: did you mean `gptq`?" in one_line(slipway("release", "demo", "--scheme", "gtpq"), USAGE)


def test_a_home_that_is_a_file_is_usage(slipway: Slipway, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "`SLIPWAY_HOME`" in one_line(slipway("status", SLIPWAY_HOME=str(tmp_path / "file")), USAGE)


def test_a_place_that_cannot_be_used_is_one_line(slipway: Slipway, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = one_line(slipway("release", "demo", SLIPWAY_HOME=str(tmp_path / "file" / "home")))
    assert f"can't use {tmp_path}/file" in line
    assert "Not a directory" in line


def test_status_with_nothing_released(slipway: Slipway) -> None:
    done = slipway("status")
    assert (done.returncode, done.stdout) == (0, "")
    assert "nothing is released yet" in done.stderr
    assert json.loads(slipway("status", "--json").stdout) == []
    assert "no release of `demo`" in slipway("status", "demo").stderr


def test_pull_and_report_with_nothing_released(slipway: Slipway, released: Path, tmp_path: Path) -> None:
    assert "demo-awq" in one_line(slipway("pull", "demo-awq", tmp_path / "to", "--json"), status=4)
    assert not (tmp_path / "to").exists()
    assert "demo-awq" in one_line(slipway("report", "demo-awq"))


def test_verify_of_a_release(slipway: Slipway, released: Path) -> None:
    done = slipway("verify", released)
    assert done.returncode == 0
    assert done.stdout.startswith(f"{released} is demo-awq, sha256:")
    document = json.loads(slipway("verify", released, "--json").stdout)
    assert document["verified"] is True
    (released / "config.json").write_bytes(b"{}")
    changed = slipway("verify", released)
    assert changed.returncode == FAILED
    assert changed.stdout.startswith("config.json: changed")


def test_verify_of_a_folder_that_is_no_release(slipway: Slipway, released: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = slipway("verify", tmp_path / "empty")
    assert (done.returncode, done.stdout) == (FAILED, "release: this folder is none: it has no release/manifest.json\n")
    document = json.loads(slipway("verify", tmp_path / "empty", "--json").stdout)
    assert document["verified"] is False
    assert [problem["name"] for problem in document["problems"]] == ["release"]


def test_verify_without_a_key_to_trust(slipway: Slipway, tmp_path: Path) -> None:
    assert "release.pub" in one_line(slipway("verify", tmp_path))


def test_doctor_tells_what_is_missing_and_fails(slipway: Slipway) -> None:
    done = slipway("doctor", "--json")
    assert done.returncode == FAILED
    engine = next(found for found in json.loads(done.stdout) if found["part"] == "engine")
    assert engine["status"] == "missing"
    shown = slipway("doctor").stdout.splitlines()
    assert shown[0].split() == ["part", "status", "found", "remedy"]
    assert len(shown) == len(json.loads(done.stdout)) + 1  # a line a part, however long


def test_stop_with_nothing_to_stop(slipway: Slipway) -> None:
    done = slipway("stop")
    assert (done.returncode, done.stdout) == (0, "")
    assert "no private engine was running" in done.stderr


def test_colours_are_for_terminals_and_not_where_they_are_unwanted(slipway: Slipway) -> None:
    assert "\x1b" not in slipway("doctor").stdout + slipway("release", "dmeo").stderr
    coloured = slipway("release", "dmeo", FORCE_COLOR="1", TERM="xterm").stderr
    assert "\x1b[31m" in coloured
    plain = slipway("release", "dmeo", FORCE_COLOR="1", TERM="xterm", NO_COLOR="1").stderr
    assert "\x1b[31m" not in plain


def entry(scheme: str, outcome: str, **changes: object) -> SchemeResult:
    measured = {
        "accuracy_change": -0.0013, "bits_per_byte_change": 0.0026, "size_ratio": 0.46, "size_bytes": 3.9e6,
        "p95_latency_ms": 97.4, "output_tokens_per_second": 131.2,
    }  # fmt: skip
    good = outcome in {"promoted", "up-to-date"}
    return SchemeResult.model_validate({
        "scheme": scheme, "outcome": outcome, "version": "3" if good else None,
        "aliases": ["candidate", "champion"] if good else [], "measured": measured if good else {}, "error": None,
        "stages": [], "gates": [], "manifest_digest": None, "image": None,
        **changes,
    })  # fmt: skip


def last_lines(capsys: pytest.CaptureFixture[str], *entries: SchemeResult) -> str:
    from pipeline.spec import load  # noqa: PLC0415 - after the fixture

    show_releases(load(DEMO.with_suffix(".yaml")), entries, 212.4)
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def test_the_last_lines_say_what_at_what_loss_how_small_how_fast_and_what_next(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = last_lines(capsys, entry("awq", "promoted"), entry("gptq", "up-to-date"))
    row = next(line for line in told.splitlines() if line.startswith("demo-awq"))
    for cell in (
        "promoted",
        "3",
        "candidate champion",
        "-0.13 points",
        "+0.26 %",
        "3.9 MB, 46% of FP16",
        "97 ms",
        "131",
    ):
        assert cell in row
    assert "1 promoted, 1 up-to-date in 212 s" in told
    for command in ("slipway report demo-awq", "slipway pull demo-awq ./demo-awq", "slipway status", "slipway ui"):
        assert f"  {command} " in told
    assert "doctor" not in told


def test_the_last_lines_of_a_refusal_say_why_and_where_the_limit_is(capsys: pytest.CaptureFixture[str]) -> None:
    told = last_lines(capsys, entry("awq", "promoted"), entry("gptq", "refused", error="drift: [too] much lost"))
    assert "demo-gptq refused: drift: [too] much lost" in told
    assert "models/demo.yaml" in told
    assert "slipway pull demo-awq" in told


def test_the_last_lines_of_a_refusal_show_what_was_measured_and_the_gate(capsys: pytest.CaptureFixture[str]) -> None:
    measured = {"accuracy_change": -0.031, "bits_per_byte_change": 0.056, "size_bytes": 3.9e6, "size_ratio": 0.46}
    gates = [{"name": "drift", "status": "fail", "reason": "too much lost", "blocks": True}]
    told = last_lines(capsys, entry("awq", "refused", error="drift: too much lost", measured=measured, gates=gates))
    row = next(line for line in told.splitlines() if line.startswith("demo-awq"))
    for cell in ("refused by drift", "-3.10 points", "+5.60 %", "3.9 MB, 46% of FP16"):
        assert cell in row


def test_the_last_lines_of_a_failure_send_to_the_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    told = last_lines(capsys, entry("awq", "failed", error="image: no engine\nand more"))
    assert "demo-awq failed: image: no engine\n" in told
    assert "slipway doctor" in told
    assert "slipway pull" not in told


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [
        (["promoted", "up-to-date"], 0),
        (["promoted", "refused"], REFUSED),
        (["refused", "failed"], FAILED),
    ],
)
def test_the_worst_ending_is_the_exit_status(outcomes: list[str], status: int) -> None:
    assert exit_status(outcomes) == status


@pytest.mark.parametrize(("flags", "machine"), [("sse4_2", "x86_64"), ("", "aarch64")])
def test_a_release_that_no_cpu_here_can_serve_is_refused_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, machine: str
) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name\t: A CPU\nflags\t\t: {flags}\n")
    monkeypatch.setattr("containers.hardware.cpu._CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    done = CliRunner().invoke(cli.main, ["release", "demo"])
    assert done.exit_code == FAILED
    assert re.search(r"error: `demo` is served by `vllm-cpu`, but .*: (use|release on) .*x86-64", done.output)
    assert not (tmp_path / "home").exists()
