"""The registry as one runs it: MLflow with users, PostgreSQL and S3, the files handed out by it or fetched from S3."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from real_server import ADMIN, BUCKET, READER, RealServer, as_user, real_server
from release_folder import FILES, make_release

from registry import VerificationError, canary, journal, promote_version, pull, rollback, verify
from registry.catalog import current, line, names
from registry.connect import open_backend
from registry.errors import PromotionError, PullError, RefusedError, TrackingError
from registry.promote import promote
from registry.promotion_lock import hold_promotion_lock
from registry.signing import SigningKey, load_or_create_key

CHECKOUT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def servers() -> Iterator[RealServer]:
    with real_server() as started:
        before = {name: os.environ.get(name) for name in started.aws()}
        os.environ.update(started.aws())
        yield started
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@pytest.fixture(params=["proxied", "direct"])
def uri(request: pytest.FixtureRequest, servers: RealServer) -> str:
    return as_user(servers.proxied, ADMIN) if request.param == "proxied" else servers.direct


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> SigningKey:
    return load_or_create_key(tmp_path_factory.mktemp("keys") / "release.pem")


@pytest.fixture
def model() -> str:
    """A release line of one's own: the servers are shared."""
    return f"demo-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def releases(tmp_path: Path, key: SigningKey, model: str) -> list[Path]:
    folders = [tmp_path / f"release-{number}" for number in range(3)]
    for number, folder in enumerate(folders):
        weights = bytes([number]) * 50_000
        files = {**FILES, "model.safetensors": weights}
        make_release(folder, key, model=model, files=files, created=f"2026-11-24T01:02:0{number}Z")
    return folders


def by_alias(uri: str, name: str) -> dict[str, str]:
    found = line(uri, name)
    assert found is not None
    return dict(found.aliases)


def test_promote_pull_roll_back_and_split(
    uri: str, releases: list[Path], model: str, key: SigningKey, tmp_path: Path
) -> None:
    name = f"{model}-awq"
    for folder in releases:
        promote(folder, uri, [key.public], key=key)
    assert promote(releases[2], uri, [key.public]).reused
    assert by_alias(uri, name) == {"candidate": "3", "champion": "3", "previous": "2"}
    pulled = pull(name, tmp_path / "out", tracking_uri=uri, trusted_keys=[key.public])
    assert pulled.manifest == verify(releases[2], [key.public]).manifest
    assert rollback(name, uri, [key.public], key=key).version == "2"
    canary(name, "1", 10, uri, [key.public], key=key)
    assert promote_version(name, "1", uri, [key.public], key=key).replaced == "2"
    assert by_alias(uri, name) == {"candidate": "3", "champion": "1", "previous": "2"}
    again = pull(name, tmp_path / "out", tracking_uri=uri, trusted_keys=[key.public], replace=True)
    assert (again.version, again.already_there) == ("1", False)
    assert verify(tmp_path / "out", [key.public]).manifest == again.manifest
    found = line(uri, name)
    assert found is not None
    assert [record.entry.action for record in journal.records(found)] == [
        *["promote"] * 3, "rollback", "canary", "promote",
    ]  # fmt: skip
    assert all(record.state == "done" and record.signed_by([key.public]) for record in journal.records(found))
    assert name in names(uri)
    assert not any("turns" in other for other in names(uri))


def test_if_changed_takes_under_a_second_of_the_processor(
    uri: str, releases: list[Path], model: str, key: SigningKey, tmp_path: Path
) -> None:
    promote(releases[0], uri, [key.public])
    (tmp_path / "key.pub").write_bytes(key.public.pem())
    command = [sys.executable, "-m", "registry", "pull", f"{model}-awq", str(tmp_path / "out"), "--if-changed"]
    command += ["--tracking-uri", uri, "--key", str(tmp_path / "key.pub")]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    seconds = []
    for _ in range(3):
        before = spent_by_children()
        assert subprocess.run(command, env=environment, check=False).returncode == 5
        seconds.append(spent_by_children() - before)
    assert min(seconds) < 1


def spent_by_children() -> float:
    """The processor's seconds of the processes that ended: another test's load does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_what_the_compose_file_starts_with_is_there(servers: RealServer, tmp_path: Path) -> None:
    document = yaml.safe_load((CHECKOUT / "registry" / "compose.yaml").read_text())
    _, *arguments = document["services"]["bucket"]["command"]
    environment = {**os.environ, **servers.aws(), "BUCKET": "made-once"}
    for _ in range(2):
        subprocess.run([sys.executable, *arguments], env=environment, check=True)
    assert boto3.resource("s3", endpoint_url=servers.s3).Bucket("made-once").creation_date is not None
    content = document["configs"]["basic_auth"]["content"].replace("${DATABASE_PASSWORD}", "word")
    (tmp_path / "basic_auth.ini").write_text(content)
    script = (
        "from mlflow.server.auth.config import read_auth_config as read; found = read()._asdict();"
        "print(*(found[name] for name in ('admin_username', 'admin_password', 'default_permission', 'database_uri')))"
    )
    named = {"MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "basic_auth.ini"), "MLFLOW_AUTH_ADMIN_PASSWORD": "first"}
    read = subprocess.check_output([sys.executable, "-c", script], env={**os.environ, **named}, text=True)
    assert read.split() == ["admin", "first", "READ", "postgresql+psycopg2://mlflow:word@database/users"]
    variables = document["services"]["mlflow"]["environment"]
    assert variables.keys() >= {"MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_AUTH_CONFIG_PATH"}
    assert variables["MLFLOW_AUTH_CONFIG_PATH"] == document["services"]["mlflow"]["configs"][0]["target"]


def _objects(servers: RealServer) -> Any:  # noqa: ANN401 - boto3 makes its types at run time
    return boto3.resource("s3", endpoint_url=servers.s3).Bucket(BUCKET).objects.all()


def test_what_was_changed_in_the_storage_is_refused_and_named(
    uri: str, servers: RealServer, releases: list[Path], model: str, key: SigningKey, tmp_path: Path
) -> None:
    name = f"{model}-awq"
    promote(releases[0], uri, [key.public])
    promote(releases[1], uri, [key.public])
    weights = verify(releases[0], [key.public]).manifest.files["model.safetensors"]
    changed = 0
    for item in _objects(servers):
        if item.key.endswith("/model.safetensors") and item.get()["Body"].read() == bytes([0]) * weights.size:
            item.put(Body=bytes([9]) * weights.size)
            changed += 1
    assert changed
    with pytest.raises(VerificationError, match=r"model\.safetensors: changed"):
        pull(f"{name}@previous", tmp_path / "out", tracking_uri=uri, trusted_keys=[key.public])
    with pytest.raises(PromotionError, match=r"model\.safetensors: changed"):
        rollback(name, uri, [key.public])
    assert not (tmp_path / "out").exists()
    assert by_alias(uri, name) == {"candidate": "2", "champion": "2", "previous": "1"}


def test_an_alias_moved_by_something_else_is_refused(
    uri: str, releases: list[Path], model: str, key: SigningKey, tmp_path: Path
) -> None:
    """The replay that needs no forgery: an older release, signed and whole, under the champion's name."""
    name = f"{model}-awq"
    for folder in releases[:2]:
        promote(folder, uri, [key.public], key=key)
    with open_backend(uri) as backend:
        backend.set_alias(name, "champion", "1")
    with pytest.raises(PullError, match=r"names version 1, but the audit trail says 2: it was not moved by Slipway"):
        pull(name, tmp_path / "out", tracking_uri=uri, trusted_keys=[key.public])
    assert not (tmp_path / "out").exists()
    promote_version(name, "2", uri, [key.public], key=key)
    assert pull(name, tmp_path / "out", tracking_uri=uri, trusted_keys=[key.public]).version == "2"


def _state(servers: RealServer) -> tuple[object, ...]:
    uri = as_user(servers.proxied, ADMIN)
    with open_backend(uri) as backend:
        everything = [(backend.line(name), len(backend.versions(name))) for name in backend.names()]
    return everything, sorted((item.key, item.e_tag) for item in _objects(servers))


@pytest.mark.parametrize(
    ("user", "message"),
    [
        (None, "asks for a user and a password.*MLFLOW_TRACKING_USERNAME"),
        (("nobody", "wrong"), "asks for a user and a password"),
        (READER, "does not permit it to this user"),
    ],
    ids=["no credentials", "wrong ones", "read-only ones"],
)
def test_who_may_not_promote_is_told_so_and_changes_nothing(
    servers: RealServer, releases: list[Path], model: str, key: SigningKey, user: tuple[str, str] | None, message: str
) -> None:
    promote(releases[0], as_user(servers.proxied, ADMIN), [key.public])
    before = _state(servers)
    uri = as_user(servers.proxied, user) if user else servers.proxied
    for attempt in (
        lambda: promote(releases[1], uri, [key.public]),
        lambda: rollback(f"{model}-awq", uri, [key.public]),
        lambda: promote_version(f"{model}-awq", "1", uri, [key.public]),
    ):
        with pytest.raises(RefusedError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
        assert "wrong" not in str(caught.value)
    assert _state(servers) == before


def test_who_may_only_read_may_pull(
    servers: RealServer, releases: list[Path], model: str, key: SigningKey, tmp_path: Path
) -> None:
    promote(releases[0], as_user(servers.proxied, ADMIN), [key.public])
    reader = as_user(servers.proxied, READER)
    assert pull(f"{model}-awq", tmp_path / "out", tracking_uri=reader, trusted_keys=[key.public]).version == "1"


def test_another_host_name_is_refused_by_the_server_and_said_so(servers: RealServer) -> None:
    from registry.server import MlflowServer  # noqa: PLC0415 - behind its curtain

    with MlflowServer(as_user(servers.proxied, ADMIN)) as server:
        server.headers["Host"] = "elsewhere.example.com"
        with pytest.raises(TrackingError, match="not under this host name"):
            server.names()


def test_promoters_and_pullers_at_once(
    uri: str, releases: list[Path], model: str, key: SigningKey, tmp_path: Path
) -> None:
    name = f"{model}-awq"
    for folder in releases:
        promote(folder, uri, [key.public], key=key)
    before = {verify(folder, [key.public]).manifest_digest for folder in releases}

    def move(number: int) -> None:
        promote_version(name, str(number % 3 + 1), uri, [key.public], key=key, who=f"promoter {number}")

    def fetch(number: int) -> str:
        folder = tmp_path / "pulled" / str(number)
        return pull(name, folder, tracking_uri=uri, trusted_keys=[key.public]).report.manifest_digest

    with ThreadPoolExecutor(12) as pool:
        moves = [pool.submit(move, number) for number in range(10)]
        pulls = [pool.submit(fetch, number) for number in range(20)]
        assert [done.result() for done in moves] == [None] * 10
        assert {done.result() for done in pulls} <= before
    found = line(uri, name)
    assert found is not None
    entries = [record.entry for record in journal.records(found)]
    assert [entry.number for entry in entries] == list(range(1, len(entries) + 1))
    champion = None
    for entry in entries:
        for moved in entry.moves:
            if moved.alias == "champion":
                assert moved.before == champion
                champion = moved.after
    assert champion == found.aliases["champion"]


TAKE = """
import sys, time
from registry.promotion_lock import hold_promotion_lock
with hold_promotion_lock(sys.argv[1], sys.argv[2], print):
    print("mine", flush=True)
    time.sleep(600)
"""


def test_a_dead_promoter_holds_nobody_up(uri: str, model: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    holder = subprocess.Popen([sys.executable, "-c", TAKE, uri, model], env=environment, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"mine\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    started = time.monotonic()
    with hold_promotion_lock(uri, model, lambda _: None) as held:
        held.check()
    assert time.monotonic() - started < 20


def test_a_promoter_of_another_machine_that_fell_silent_is_passed_after_its_lease(
    uri: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.promotion_lock.LEASE_SECONDS", 2.0)
    with open_backend(uri) as backend:
        backend.create_line(f"slipway-turns.{model}", {})
        elsewhere = '{"machine": "another", "pid": 1, "started": "1", "nonce": "x"}'
        backend.create_version(f"slipway-turns.{model}", "slipway:/turn", {"slipway.maker": elsewhere})
    started = time.monotonic()
    with hold_promotion_lock(uri, model, lambda _: None):
        assert time.monotonic() - started > 2


def test_a_turn_that_was_lost_is_noticed_before_anything_is_written(uri: str, model: str) -> None:
    with hold_promotion_lock(uri, model, lambda _: None) as held, open_backend(uri) as backend:
        for version in backend.versions(f"slipway-turns.{model}"):
            backend.delete_version(version.name, version.version)
        with pytest.raises(PromotionError, match="promotion lock was lost"):
            held.check()


def test_versions_are_told_newest_first_with_their_places(
    uri: str, releases: list[Path], model: str, key: SigningKey
) -> None:
    for folder in releases[:2]:
        promote(folder, uri, [key.public])
    found = current(uri, f"{model}-awq")
    assert [version.version for version in found] == ["2", "1"]
    assert all(version.location and version.manifest_digest for version in found)
