"""Many at once, and killed at any moment: what an alias names is whole, and what was begun is gone on with."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_server import mlflow_server
from release_folder import FILES, make_release

from registry import journal, pull, verify
from registry.catalog import current, line
from registry.promote import promote
from registry.signing import SigningKey, load_or_create_key
from registry.stored import verify_stored

CHECKOUT = Path(__file__).parent.parent.parent
ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT), "MLFLOW_DISABLE_TELEMETRY": "true"}


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> SigningKey:
    key = load_or_create_key(tmp_path_factory.mktemp("keys") / "release.pem")
    key_file(tmp_path_factory).write_bytes(key.public.pem())
    return key


def key_file(factory: pytest.TempPathFactory) -> Path:
    return factory.getbasetemp() / "endurance.pub"


def champions(uri: str) -> list[str | None]:
    """Every version that was champion, in order, held to the journal: each entry starts where the one before ended."""
    found = line(uri, "demo-awq")
    assert found is not None
    records = journal.records(found)
    assert [record.entry.number for record in records] == list(range(1, len(records) + 1))
    assert {record.state for record in records} == {"done"}
    times = [record.entry.when for record in records]
    assert times == sorted(times)
    seen: list[str | None] = []
    at: dict[str, str | None] = {}
    for record in records:
        for move in record.entry.moves:
            assert move.before == at.get(move.alias)
            at[move.alias] = move.after
            if move.alias == "champion":
                seen.append(move.after)
    assert {alias: number for alias, number in at.items() if number} == dict(found.aliases)
    return seen


MANY = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from registry import load_trusted_keys, promote_version, pull
from registry.promote import promote
what, uri, public, folder, count, first = sys.argv[1:]
keys = load_trusted_keys([Path(public)])

def promotes(number):
    if number % 2:
        promote(Path(folder) / f"release-{number % 5}", uri, keys, who=f"promoter {number}")
    else:
        promote_version("demo-awq", str(number % 3 + 1), uri, keys, who=f"promoter {number}")

def pulls(number):
    target = Path(folder) / "pulled" / str(number)
    return pull("demo-awq", target, tracking_uri=uri, trusted_keys=keys).report.manifest_digest

with ThreadPoolExecutor(int(count)) as pool:
    numbers = range(int(first), int(first) + int(count))
    print(json.dumps(list(pool.map(promotes if what == "promote" else pulls, numbers))))
"""


@pytest.mark.parametrize(
    ("promotions", "pulls"), [(10, 60), pytest.param(50, 500, marks=pytest.mark.long)], ids=["some", "many"]
)
def test_promotions_and_pulls_at_once(
    tmp_path: Path, key: SigningKey, tmp_path_factory: pytest.TempPathFactory, promotions: int, pulls: int
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for number in range(5):
        files = {**FILES, "model.safetensors": bytes([number]) * 20_000}
        make_release(tmp_path / f"release-{number}", key, files=files, created=f"2026-11-24T01:02:0{number}Z")
    for number in range(3):
        promote(tmp_path / f"release-{number}", uri, [key.public])
    known = {verify(tmp_path / f"release-{number}", [key.public]).manifest_digest for number in range(5)}
    public = str(key_file(tmp_path_factory))

    def start(what: str, count: int, first: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", MANY, what, uri, public, str(tmp_path), str(count), str(first)]
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE)

    half, pullers = promotions // 2, min(10, pulls // 20)
    running = [start("promote", half, 0), start("promote", half, half)]
    running += [start("pull", pulls // pullers, pulls // pullers * number) for number in range(pullers)]
    outputs = [process.communicate()[0] for process in running]
    assert {process.returncode for process in running} == {0}
    pulled = [digest for output in outputs[2:] for digest in json.loads(output)]
    assert len(pulled) == pulls
    assert set(pulled) <= known
    for number in range(0, pulls, 25):
        assert verify(tmp_path / "pulled" / str(number), [key.public]).manifest_digest == pulled[number]
    assert len(current(uri, "demo-awq")) == 5
    assert len(champions(uri)) > 3


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import mlflow.tracking, mlflow.store.tracking.sqlalchemy_store, mlflow.store.model_registry.sqlalchemy_store
from registry import load_trusted_keys
from registry.promote import promote
uri, public, folder, seed, count = sys.argv[1:]
keys, chance = load_trusted_keys([Path(public)]), random.Random(int(seed))

def begin(number):
    child = os.fork()
    if child == 0:
        promote(Path(folder) / f"release-{number}", uri, keys)
        os._exit(0)
    return child

def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

took = []
for number in range(3):
    started = time.monotonic()
    assert end(begin(number)) == 0
    took.append(time.monotonic() - started)
for number in range(3, int(count)):
    child = begin(number)
    time.sleep(chance.uniform(0, min(took)))
    os.kill(child, signal.SIGKILL)
    print(json.dumps([number, end(child)]), flush=True)
    sys.stdin.readline()
    assert end(begin(number)) == 0
    print(json.dumps([number, 0]), flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("moments", [8, pytest.param(20, marks=pytest.mark.long)])
def test_a_promotion_killed_at_random_moments(
    tmp_path: Path, key: SigningKey, tmp_path_factory: pytest.TempPathFactory, moments: int
) -> None:
    count = moments + 3  # the first three tell how long one takes
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for number in range(count):
        make_release(tmp_path / f"release-{number}", key, created=f"2026-11-24T01:02:{number:02}Z")
    command = [sys.executable, "-c", KILLED, uri, str(key_file(tmp_path_factory)), str(tmp_path), "7", str(count)]
    script = subprocess.Popen(
        command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert script.stdin is not None
    assert script.stdout is not None
    killed = 0
    for told in script.stdout:
        number, status = json.loads(told)
        killed += status == -signal.SIGKILL
        by_alias = {alias: version for version in current(uri, "demo-awq") for alias in version.aliases}
        for version in by_alias.values():
            verify_stored(version, uri, [key.public])
        if status == 0:
            manifest = verify(tmp_path / f"release-{number}", [key.public]).manifest_digest
            assert by_alias["champion"].manifest_digest == by_alias["candidate"].manifest_digest == manifest
        script.stdin.write("\n")
    assert script.wait() == 0
    script.stdin.close()
    script.stdout.close()
    assert killed >= moments // 4  # the others were done before
    assert len(current(uri, "demo-awq")) == count
    assert champions(uri) == [str(number) for number in range(1, count + 1)]
    assert len(list((tmp_path / "artifacts/models").iterdir())) == count


PULL = """
import json, sys, time
from pathlib import Path
from registry import load_trusted_keys, pull, stream
uri, public, target = sys.argv[1:]

def slowly(reader, buffer, read=stream._Body.readinto):
    count = read(reader, buffer)
    time.sleep(count / 20e6)  # so that whoever watches has the time to kill
    return count

stream._Body.readinto = slowly
pulled = pull("demo-awq", Path(target), tracking_uri=uri, trusted_keys=load_trusted_keys([Path(public)]))
peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
print(json.dumps([pulled.fetched_bytes, peak]))
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    options = ["--artifacts-destination", str(tmp_path / "server" / "files")]
    with mlflow_server(tmp_path / "server", f"sqlite:///{tmp_path}/server.db", options, {}) as address:
        yield address


@pytest.mark.parametrize(
    "file_bytes", [12_500_000, pytest.param(250_000_000, marks=pytest.mark.long)], ids=["100 MB", "2 GB"]
)
def test_a_pull_killed_at_20_random_moments_moves_no_byte_twice_but_those_in_flight(
    server: str, tmp_path: Path, key: SigningKey, tmp_path_factory: pytest.TempPathFactory, file_bytes: int
) -> None:
    chance = random.Random(11)
    release = tmp_path / "release"
    release.mkdir()
    block = os.urandom(500_000)
    for number in range(8):
        with (release / f"model-{number}.safetensors").open("wb") as file:
            for part in range(file_bytes // len(block)):
                file.write(bytes([number, part % 256]) + part.to_bytes(2, "big") + block[4:])
    small = {name: data for name, data in FILES.items() if name != "model.safetensors"}
    manifest = make_release(release, key, files=small)
    promote(release, server, [key.public])
    target = tmp_path / "pulled" / "here"
    command = [sys.executable, "-c", PULL, server, str(key_file(tmp_path_factory)), str(target)]

    def held() -> int:
        listed = manifest.files
        return sum(
            size_of(path)
            for folder in target.parent.glob(".here.part-*")
            for path in folder.rglob("*")
            if path.relative_to(folder).as_posix() in listed
        )

    before, kills = 0, 0
    while kills < 20 and before < manifest.size_bytes * 0.7:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        enough = before + chance.uniform(0, 0.1) * manifest.size_bytes
        while held() < enough:
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        process.wait()
        kills += 1
        assert not target.exists()
        assert held() >= before
        before = held()
    assert kills >= 5
    done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, check=True)
    moved, peak = json.loads(done.stdout)
    assert moved == manifest.size_bytes - before
    assert peak < 200
    verify(target, [key.public])
    assert [path.name for path in target.parent.iterdir()] == ["here"]
    pull("demo-awq", target, tracking_uri=server, trusted_keys=[key.public])


def size_of(path: Path) -> int:
    """What a file holds that may be gone by now."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0
