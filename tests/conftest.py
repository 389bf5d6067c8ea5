"""What every test may use, and the rule that nothing skips for want of something that a machine can have."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import docker
import hypothesis
import pytest
from xdist.remote import Producer

from containers.engine.engine import connect
from homes import make_home
from pipeline.settings import Settings
from pipeline.workers.runner import Workers
from schedule import ByGroup, place

# What `make test` cannot install.
_MAY_LACK = ("needs a GPU", "needs AVX-512")
_skipped: list[str] = []


# How long an example takes tells how busy the machine is.
hypothesis.settings.register_profile("slipway", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("slipway")


def pytest_configure() -> None:
    # A shell's background job is started deaf to Ctrl-C, and so is all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # of a worker of xdist
        items.sort(key=place)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByGroup:
    return ByGroup(config, log)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if not any(lacked in reason for lacked in _MAY_LACK):
            _skipped.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _skipped:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _skipped:
        terminalreporter.write_line(f"FAILED for skipping what this machine can have: {line}", red=True)
    cpu = Settings.read().cpu
    without = "and without AVX-512 where tests/end_to_end/test_instruction_sets.py says so"
    kernels = "with AVX2 alone" if cpu.instruction_set == "avx2" else f"with {cpu.instruction_set}, {without}"
    terminalreporter.write_line(f"CPU: {cpu.model}; models ran {kernels}")


@pytest.fixture(scope="session")
def machine() -> Settings:
    """The settings that `make test` prepared: its engine and environments are shared by all tests."""
    return Settings.read()


@pytest.fixture(scope="session")
def engine(machine: Settings) -> Iterator[docker.DockerClient]:
    """A real container engine."""
    client = connect(machine.docker_host, machine.home)
    yield client
    client.close()


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, machine: Settings) -> dict[str, str]:
    """The environment of an empty $SLIPWAY_HOME that this session's stage tests share."""
    return make_home(tmp_path_factory.mktemp("slipway") / "home", machine)


@pytest.fixture(scope="session")
def settings(home: dict[str, str]) -> Settings:
    """The settings of the session's home."""
    return Settings.read(home)


@pytest.fixture
def instance_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts back after the test what opening a Dagster instance sets in the environment."""
    for name in ("SLIPWAY_DAGSTER_STORAGE", "SLIPWAY_DAGSTER_POSTGRES"):
        monkeypatch.setenv(name, "")


@pytest.fixture
def run_worker(settings: Settings) -> Workers:
    """Runs a worker script in its real environment."""
    return Workers(settings, print)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A secret of the operator's that nothing from outside may lead to."""
    path = tmp_path / "outside.txt"
    path.write_text("secret")
    path.chmod(0o600)
    return path
