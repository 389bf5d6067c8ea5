"""The sandbox on a real engine: hardened, watched, and gone afterwards, however that comes about."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest
from docker.models.containers import Container

from containers.engine.owner import HOME_LABEL, home_digest
from containers.errors import SandboxError, UnhealthyError
from containers.hardware.core_pool import CoreRequest
from containers.hardware.cpu import InstructionSet, this_cpu
from containers.image.base import ensure_base
from containers.image.profile import load
from containers.sandbox import isolation
from containers.sandbox.memory import _stats_reader
from containers.sandbox.sandbox import Server, serve, sweep
from evals.load import faults
from homes import Slipway
from server_image import server_image

MIB = 2**20


@pytest.fixture(scope="module")
def image(engine: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The scripted server on the base of the CPU runtime."""
    base = ensure_base(engine, load("vllm-cpu"), tmp_path_factory.mktemp("base"), print)
    with server_image(engine, base.reference) as built:
        yield built


@pytest.fixture
def start(engine: docker.DockerClient, image: str, tmp_path: Path) -> Callable[..., Any]:
    """Serve the scripted server, with a home of its own for every test."""

    def serving(*, memory_mib: int = 256, timeout: float = 30.0, **options: Any) -> Any:  # noqa: ANN401 - as serve
        return serve(
            engine, image, name="slipway-test", home=tmp_path, memory_bytes=memory_mib * MIB,
            start_timeout_s=timeout, progress=print, **options,
        )  # fmt: skip

    return serving


def networks(engine: docker.DockerClient, home: Path) -> list[Any]:
    return engine.networks.list(filters={"label": f"{HOME_LABEL}={home_digest(home)}"})


def containers(engine: docker.DockerClient, home: Path) -> list[Container]:
    return engine.containers.list(all=True, filters={"label": f"{HOME_LABEL}={home_digest(home)}"})


def test_a_server_is_hardened_and_reachable_from_here_alone_and_removed(
    engine: docker.DockerClient, start: Callable[..., Any], tmp_path: Path
) -> None:
    with start(cpus=1.5, labels={"slipway.stage": "load"}) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert server.url.endswith(":8000")
        assert server.network is not None
        assert server.network.startswith("internal")
        assert server.died() is None
        settings = server.container.attrs
        host = settings["HostConfig"]
        assert host["ReadonlyRootfs"]
        assert host["CapDrop"] == ["ALL"]
        assert host["SecurityOpt"] == ["no-new-privileges"]
        assert host["Memory"] == host["MemorySwap"] == 256 * MIB
        assert host["NanoCpus"] == 1_500_000_000
        assert host["PidsLimit"] == 1024
        assert settings["Config"]["User"] == "65534:65534"
        assert settings["Config"]["Labels"]["slipway.stage"] == "load"
        assert not any(settings["NetworkSettings"]["Ports"].values())
        probe = "import os; print(os.getuid(), open('/proc/self/status').read().count('CapEff:\\t0000000000000000'))"
        assert server.container.exec_run(["python3", "-c", probe]).output.split() == [b"65534", b"1"]
        assert server.container.exec_run(["touch", "/touched"]).exit_code != 0
        assert server.container.exec_run(["touch", "/tmp/touched"]).exit_code == 0  # noqa: S108 - in the container
    assert containers(engine, tmp_path) == []
    assert networks(engine, tmp_path) == []


def test_servers_run_on_cores_of_their_own(start: Callable[..., Any], tmp_path: Path) -> None:
    probe = ["python3", "-c", "import os; print(*os.sched_getaffinity(0), os.environ['VLLM_CPU_OMP_THREADS_BIND'])"]
    wanted = CoreRequest(tmp_path, 1)
    with start(cores=wanted) as one, start(cores=wanted) as two:
        seen = [server.container.exec_run(probe).output.decode().split() for server in (one, two)]
        assert seen == [[server.cores.cpuset] * 2 for server in (one, two)]
        assert set(one.cores.numbers) | set(two.cores.numbers) <= os.sched_getaffinity(0)
        assert two.cores.shared == (one.cores.numbers == two.cores.numbers)
        assert two.cores.shared == (len(os.sched_getaffinity(0)) == 1)
    with start() as server:
        assert (server.cores, server.cpu) == (None, None)
        assert server.container.attrs["HostConfig"]["CpusetCpus"] == ""


def test_a_server_is_held_to_an_older_cpu_where_it_is_asked(
    start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller's own environment is nothing to it: the limit comes from the settings that were read."""
    monkeypatch.setenv("SLIPWAY_CPU_ISA", "avx512")
    probe = ["python3", "-c", "import os; print(os.environ.get('SLIPWAY_CPU_ISA'))"]
    limits: tuple[tuple[InstructionSet | None, bytes], ...] = (("avx2", b"avx2"), (None, b"None"))
    for limit, seen in limits:
        with start(cores=CoreRequest(tmp_path, 1), cpu_limit=limit) as server:
            assert server.container.exec_run(probe).output.strip() == seen
            assert server.computed_on.instruction_set == this_cpu(limit).instruction_set


def test_what_an_engine_says_of_its_kernels_is_read_from_its_log(start: Callable[..., Any], tmp_path: Path) -> None:
    told = {
        "attention": "CPU_ATTN", "compute_dtype": "bfloat16", "cpu_model": "A CPU", "instruction_set": "avx2",
        "kv_cache_dtype": "bfloat16", "linear_16bit": "float32", "linear_quantized": {"K": 28}, "threads": 2,
    }  # fmt: skip
    said = ["--says", f"(Worker pid=7) slipway kernels: {json.dumps(told)}"]
    with start(command=said, cores=CoreRequest(tmp_path, 1)) as server:
        assert server.kernels.model_dump() == told
        assert server.computed_on.cpu_model == "A CPU"
        assert server.computed_on.cores == server.cores.numbers
    with start() as silent:
        assert silent.kernels is None


def test_nothing_gets_out_of_the_sandbox(start: Callable[..., Any]) -> None:
    probe = (
        "import socket\n"
        "routes = [line.split()[1] for line in open('/proc/net/route').readlines()[1:]]\n"
        "print('default route' if '00000000' in routes else 'no default route')\n"
        "socket.setdefaulttimeout(3)\n"
        "dial = lambda: socket.create_connection(('192.0.2.1', 80))\n"
        "ask = lambda: socket.getaddrinfo('example.com', 80)\n"
        "for what in (dial, ask):\n"
        "    try:\n        what(); print('out')\n"
        "    except OSError as error:\n        print('kept in')\n"
    )
    with start() as server:
        seen = server.container.exec_run(["python3", "-c", probe]).output.decode().splitlines()
    assert seen == ["no default route", "kept in", "kept in"]


# Python runs this before the server's own code: it asks the network's first address, this machine, again and again.
EAGER = """
import os, socket, threading, time

def ask():
    first = socket.gethostbyname(socket.gethostname()).rpartition(".")[0] + ".1"
    end, reached = time.monotonic() + 3, 0
    while time.monotonic() < end:
        with socket.socket() as probe:
            probe.settimeout(0.05)
            reached += probe.connect_ex((first, int(os.environ["PROBED"]))) == 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.sendto(b"x", (first, int(os.environ["PROBED"])))
        except OSError:
            pass
    open("/tmp/asked", "w").write(f"{first} {reached}")

threading.Thread(target=ask, daemon=True).start()
"""


def test_a_server_reaches_no_service_of_this_machine_from_its_first_moment_on(
    start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = isolation._sealed

    def slowly(container: Container) -> Any:  # noqa: ANN401 - as it is
        time.sleep(1)  # on a busy machine
        return seal(container)

    monkeypatch.setattr(isolation, "_sealed", slowly)
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "sitecustomize.py").write_text(EAGER)
    with socket.create_server(("0.0.0.0", 0)) as service, socket.socket(type=socket.SOCK_DGRAM) as datagrams:  # noqa: S104
        datagrams.bind(service.getsockname())
        for listening in (service, datagrams):
            listening.settimeout(0.2)
        environment = {"PYTHONPATH": "/probe", "PROBED": str(service.getsockname()[1])}
        with start(environment=environment, mounts={tmp_path / "probe": "/probe"}) as server:
            assert server.network == isolation.ISOLATED
            for restarted in (False, True):
                if restarted:
                    server.restart()
                first, reached = asked(server).split()
                assert (first.rpartition(".")[0], reached) == (server.url.split("/")[2].rpartition(".")[0], "0")
                with pytest.raises(TimeoutError):
                    service.accept()
                with pytest.raises(TimeoutError):
                    datagrams.recv(1)
            assert httpx.get(f"{server.url}/health").status_code == 200
            with socket.create_connection((first, service.getsockname()[1])):
                service.accept()[0].close()  # which this machine itself reaches


def asked(server: Server) -> str:
    """Wait for what the server's process found, and return it."""
    assert server.container is not None
    deadline = time.monotonic() + 30
    while True:
        found = server.container.exec_run(["cat", "/tmp/asked"])  # noqa: S108 - in the container
        if found.exit_code == 0 and found.output:
            return str(found.output.decode())  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_where_rules_can_not_be_set_the_evidence_says_so(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "_FAMILIES", ("no-such-firewall",))
    with start() as server:
        assert server.network == isolation.UNSEALED
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_network_is_removed_as_soon_as_its_last_container_has_left(
    engine: docker.DockerClient, start: Callable[..., Any], tmp_path: Path
) -> None:
    with start() as server, ThreadPoolExecutor(1) as beside:
        (network,) = networks(engine, tmp_path)
        removing = beside.submit(isolation.remove, network)
        with pytest.raises(TimeoutError):
            removing.result(timeout=1)
        network.disconnect(server.container, force=True)
        removing.result()
        assert networks(engine, tmp_path) == []


def test_a_server_that_was_killed_starts_again(start: Callable[..., Any]) -> None:
    with start() as server:
        server.container.kill()
        assert str(server.died()).startswith("ended with status 137 (SIGKILL")
        server.restart()
        assert server.died() is None
        assert httpx.get(f"{server.url}/health").status_code == 200
        before = len(server.memory.samples)
        time.sleep(0.5)
        assert len(server.memory.samples) > before


@pytest.mark.timed
def test_a_server_that_outlives_its_time_is_killed(start: Callable[..., Any]) -> None:
    with start(lifetime_s=1.0) as server:
        time.sleep(2.5)
        assert str(server.died()).startswith("ended with status 137 (SIGKILL")


def test_samples_survive_an_out_of_memory_kill(start: Callable[..., Any]) -> None:
    # A leak of 8 MiB a request under a limit of 128.
    with start(memory_mib=128, command=["--leak-kib", "8192", "--service-ms", "1"]) as server:
        for _ in range(40):
            try:
                body = {"model": "scripted", "prompt": "x", "stream": True, "max_tokens": 1}
                httpx.post(f"{server.url}/v1/completions", json=body)
            except httpx.HTTPError:
                break
        deadline = time.monotonic() + 10
        while server.died() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert "ran out of memory" in str(server.died())
        assert 64 * MIB < server.memory.peak() <= 128 * MIB


def test_what_a_server_wrote_is_kept_without_prompts(start: Callable[..., Any], tmp_path: Path) -> None:
    talk = "import sys; print('ready, prompt: the secret of a user', flush=True); sys.exit(3)"
    with pytest.raises(SandboxError) as raised:
        start(command=["--no-such-option", talk]).__enter__()
    (log,) = (tmp_path / "logs").glob("*.container.log")
    for text in (log.read_text(), str(raised.value)):
        assert "unrecognized arguments" in text
        assert "the secret of a user" not in text


@pytest.mark.timed
def test_faults_are_survived_and_told_in_a_table(start: Callable[..., Any]) -> None:
    with start(command=["--service-ms", "200", "--context", "512"]) as server:
        table = faults.inflict(server, "scripted", 512, recovery_s=60, progress=print)
        assert server.died() is None
    assert {fault.name: fault.ok for fault in table} == {
        "malformed JSON": True, "unknown model name": True, "prompt over the context": True,
        "client hangs up": True, "slow reader": True, "1,000 connections at once": True,
        # It is one process, and none of vLLM's name.
        "engine process killed": None, "memory limit hit": True, "container killed under load": True,
    }  # fmt: skip
    (killed,) = [fault for fault in table if fault.name.startswith("container")]
    assert killed.seconds is not None
    assert killed.seconds < 30


@pytest.mark.timed
def test_a_server_without_manners_fails_each_by_name(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "ANSWER_SECONDS", 1.0)
    with start() as server:
        alone = replace(server, container=None)
        table = faults.inflict(alone, "another-name", 2048, recovery_s=60, progress=print)
    failed = {fault.name for fault in table if fault.ok is False}
    # It takes every request for one of a model that it has not: 404 where a 400 is due, and no answers at all.
    assert "prompt over the context" in failed
    assert "unknown model name" in failed


@pytest.mark.timed
def test_memory_is_read_from_the_cgroup_ten_times_a_second(start: Callable[..., Any]) -> None:
    with start(command=["--allocate-mib", "64"]) as server:
        time.sleep(1.0)
        server.memory.phase = "load"
        time.sleep(1.0)
        # Ten a second, but for a few that a busy machine misses.
        assert sum(sample.phase == "load" for sample in server.memory.samples) >= 7
        assert server.memory.source.startswith("cgroup")
        assert 64 * MIB < server.memory.peak() < 200 * MIB


def test_memory_is_had_from_the_engine_where_its_cgroups_are_elsewhere(start: Callable[..., Any]) -> None:
    with start(command=["--allocate-mib", "64"]) as server:
        values = _stats_reader(server.container)()
        assert values is not None
        assert 64 * MIB < values["memory_bytes"] < 200 * MIB


def test_a_server_that_dies_at_once_is_told_with_its_error(
    engine: docker.DockerClient, start: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(
        SandboxError, match=r"ended with status 2 before it was healthy: .*unrecognized arguments.*; log: "
    ):
        start(command=["--no-such-option"]).__enter__()
    assert containers(engine, tmp_path) == []


def test_a_server_that_needs_more_memory_than_it_has_is_told_as_such(
    engine: docker.DockerClient, start: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(SandboxError, match=r"ran out of memory \(limit 0\.06 GiB"):
        start(memory_mib=64, command=["--allocate-mib", "200"]).__enter__()
    assert containers(engine, tmp_path) == []


def test_a_server_that_never_gets_healthy_is_given_up(
    engine: docker.DockerClient, start: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(UnhealthyError, match="not healthy within 2 s"):
        start(timeout=2.0, command=["--healthy-after", "-1"]).__enter__()
    assert containers(engine, tmp_path) == []


def test_a_death_under_load_is_seen(start: Callable[..., Any]) -> None:
    with start() as server:
        server.container.kill()
        assert str(server.died()).startswith("ended with status 137 (SIGKILL")


def test_an_image_that_is_gone_is_an_error(engine: docker.DockerClient, tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="build it again"):
        serve(engine, "sha256:" + "0" * 64, name="x", home=tmp_path, memory_bytes=64 * MIB, progress=print).__enter__()


def test_an_image_by_a_name_that_may_move_is_refused(engine: docker.DockerClient, tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="is a tag"):
        serve(engine, "debian:12", name="x", home=tmp_path, memory_bytes=64 * MIB, progress=print).__enter__()


def test_an_exception_in_the_block_removes_the_container(
    engine: docker.DockerClient, start: Callable[..., Any], tmp_path: Path
) -> None:
    def interrupt() -> None:
        with start():
            assert len(containers(engine, tmp_path)) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert containers(engine, tmp_path) == []


HOLD = """
import sys, time
from pathlib import Path
import docker
from containers.sandbox.sandbox import serve
client = docker.DockerClient(sys.argv[1])
home = Path(sys.argv[3])
with serve(client, sys.argv[2], name="slipway-test", home=home, memory_bytes=2**28, progress=print):
    print("serving", flush=True)
    time.sleep(120)
"""


def socket_of(engine: docker.DockerClient) -> str:
    adapter: Any = engine.api.get_adapter(engine.api.base_url)
    return f"unix://{adapter.socket_path}"


@pytest.fixture
def holder(engine: docker.DockerClient, image: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that holds a server."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, socket_of(engine), image, str(tmp_path)],
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent.parent,
    )  # fmt: skip
    assert process.stdout is not None
    while process.stdout.readline().strip() != "serving":
        assert process.poll() is None
    yield process
    process.kill()
    process.communicate()
    sweep(engine, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_told_to_end_takes_its_container_along(
    engine: docker.DockerClient, holder: subprocess.Popen[str], tmp_path: Path, number: signal.Signals
) -> None:
    holder.send_signal(number)
    holder.wait(timeout=30)
    assert containers(engine, tmp_path) == []


def test_a_killed_process_leaves_a_container_that_the_next_sweeps(
    engine: docker.DockerClient, holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert sweep(engine, tmp_path) == []
    os.kill(holder.pid, signal.SIGKILL)
    assert len(containers(engine, tmp_path)) == 1
    assert sweep(engine, tmp_path / "another-home") == []
    holder.wait()
    assert len(networks(engine, tmp_path)) == 1
    assert len(sweep(engine, tmp_path)) == 1
    assert containers(engine, tmp_path) == networks(engine, tmp_path) == []


def test_after_a_kill_any_next_command_leaves_nothing_running(
    engine: docker.DockerClient, holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert len(containers(engine, tmp_path)) == 1
    slipway = Slipway({**os.environ, "SLIPWAY_HOME": str(tmp_path), "DOCKER_HOST": socket_of(engine)})
    slipway("verify", tmp_path)
    assert containers(engine, tmp_path) == networks(engine, tmp_path) == []


def test_a_server_is_what_serve_gives(start: Callable[..., Any]) -> None:
    with start() as server:
        assert isinstance(server, Server)
        assert 0 < server.started_seconds < 30
