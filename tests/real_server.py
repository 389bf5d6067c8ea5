"""A real registry for tests: MLflow with users, PostgreSQL and an S3, all of them real but the S3, which is moto's."""

from __future__ import annotations

import json
import os
import pwd
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from node_packages import install, node

from containers.engine.engine import install_packages
from registry.digests import digest_file
from registry.file_locks import locked

ADMIN, READER = ("admin", "an admin's password"), ("reader", "a reader's password")
BUCKET = "releases"
AZURITE = Path(__file__).with_name("azurite")
AWS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass(frozen=True)
class RealServer:
    """``proxied`` hands the files out itself, ``direct`` says where in S3 they are; addresses without a user."""

    proxied: str
    direct: str
    s3: str

    def aws(self) -> dict[str, str]:
        """The environment in which S3 is reached."""
        return {**AWS, "AWS_ENDPOINT_URL": self.s3}


@contextmanager
def real_server() -> Iterator[RealServer]:
    """Start all of it, on loopback, in a folder that is removed."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slipway-server-")))
        folder.chmod(0o755)
        database = stack.enter_context(postgres(folder, "proxied", "direct", "users"))
        s3 = stack.enter_context(s3_server(folder))
        config = folder / "basic_auth.ini"
        config.write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {database}/users\nadmin_username = {ADMIN[0]}\n"
            f"admin_password = {ADMIN[1]}\n"
            "auth_cache_ttl_seconds = 60\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        environment = {
            **AWS, "MLFLOW_S3_ENDPOINT_URL": s3, "AWS_ENDPOINT_URL": s3, "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "of the tests",
        }  # fmt: skip
        proxied = ["--artifacts-destination", f"s3://{BUCKET}/proxied", "--app-name", "basic-auth"]
        one = stack.enter_context(mlflow_server(folder / "proxied", f"{database}/proxied", proxied, environment))
        _request(f"{one}/api/2.0/mlflow/users/create", {"username": READER[0], "password": READER[1]}, ADMIN)
        direct = ["--no-serve-artifacts", "--default-artifact-root", f"s3://{BUCKET}/direct"]
        two = stack.enter_context(mlflow_server(folder / "direct", f"{database}/direct", direct, environment))
        yield RealServer(one, two, s3)


def as_user(address: str, user: tuple[str, str]) -> str:
    """The address with the user in it."""
    from registry.tracking import with_credentials  # noqa: PLC0415 - what a deployment does

    return with_credentials(address, {"MLFLOW_TRACKING_USERNAME": user[0], "MLFLOW_TRACKING_PASSWORD": user[1]})


@contextmanager
def mlflow_server(folder: Path, store: str, options: list[str], environment: Mapping[str, str]) -> Iterator[str]:
    """An MLflow server with one worker and without jobs; gives its address."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store, *options]
    inherited = {"PATH": os.environ["PATH"], "HOME": str(folder), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with _process(command, folder, {**inherited, **environment}) as process:
        _wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log")
        yield f"http://127.0.0.1:{port}"


@contextmanager
def postgres(folder: Path, *databases: str) -> Iterator[str]:
    """A PostgreSQL of its own, which will not run as root, with databases; gives their address, without the name."""
    programs = _postgres_programs()
    data, port = folder / "postgres", free_port()
    data.mkdir()
    user = pwd.getpwnam("postgres") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    os.chown(data, user.pw_uid, user.pw_gid)
    lower = (
        ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"] if os.geteuid() == 0 else []
    )
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}

    def run(*command: str) -> None:
        subprocess.run([*lower, *command], cwd=data, env=environment, check=True, stdout=subprocess.DEVNULL)

    run(str(programs / "initdb"), "-D", str(data / "db"), "-U", "slipway", "--auth=trust", "--no-sync")
    options = f"-h 127.0.0.1 -p {port} -k {data} -c fsync=off"
    run(str(programs / "pg_ctl"), "-D", str(data / "db"), "-o", options, "-l", str(data / "log"), "-w", "start")
    try:
        for name in databases:
            run(str(programs / "createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", "slipway", name)
        yield f"postgresql+psycopg2://slipway@127.0.0.1:{port}"
    finally:
        run(str(programs / "pg_ctl"), "-D", str(data / "db"), "-m", "immediate", "-w", "stop")


def _postgres_programs() -> Path:
    place = Path("/usr/lib/postgresql")
    if not list(place.glob("*/bin")):
        install_packages(["postgresql"], print)
    return max(place.glob("*/bin"))


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """An S3 with one bucket, `BUCKET`, in memory; gives its address."""
    port = free_port()
    (folder / "s3").mkdir()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _process(command, folder / "s3", {"PATH": os.environ["PATH"], "HOME": str(folder)}) as process:
        address = f"http://127.0.0.1:{port}"
        _wait_for(f"{address}/moto-api/", process, folder / "s3" / "log")
        urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT"), timeout=10).close()  # noqa: S310
        yield address


@contextmanager
def gs_server(folder: Path) -> Iterator[str]:
    """An emulator of Google Cloud Storage, in memory; gives its address."""
    port = free_port()
    (folder / "gs").mkdir()
    program = str(Path(sys.executable).with_name("gcp-storage-emulator"))
    command = [program, "start", "--host", "127.0.0.1", "--port", str(port), "--in-memory"]
    with _process(command, folder / "gs", {"PATH": os.environ["PATH"], "HOME": str(folder)}) as process:
        address = f"http://127.0.0.1:{port}"
        _wait_for(f"{address}/storage/v1/b", process, folder / "gs" / "log")
        yield address


@contextmanager
def az_server(folder: Path) -> Iterator[str]:
    """Azurite, npm's emulator of Azure's storage, in memory; gives its address."""
    port = free_port()
    (folder / "az").mkdir()
    command = [node("node"), str(_azurite()), "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    command += ["--inMemoryPersistence", "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    with _process(command, folder / "az", {"PATH": os.environ["PATH"], "HOME": str(folder)}) as process:
        for _ in range(600):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None, (folder / "az" / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"


def _azurite() -> Path:
    """The program, which npm installs once for each checkout."""
    place = Path(sys.executable).parents[1] / f"azurite-{digest_file(AZURITE / 'package-lock.json')[:12]}"
    with locked(place.with_suffix(".lock")):
        if not (program := place / "node_modules" / ".bin" / "azurite-blob").exists():
            install(AZURITE, place)
    return program


def azurite_connection(address: str) -> str:
    """The connection string of Azurite's own account, whose key is the same everywhere."""
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
    account = "devstoreaccount1"
    return f"DefaultEndpointsProtocol=http;AccountName={account};AccountKey={key};BlobEndpoint={address}/{account};"


@contextmanager
def _process(command: list[str], folder: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 15)
            process.wait(30)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _request(address: str, body: Mapping[str, str], user: tuple[str, str]) -> None:
    import base64  # noqa: PLC0415 - for this one header

    secret = base64.b64encode(":".join(user).encode()).decode()
    headers = {"Authorization": f"Basic {secret}", "Content-Type": "application/json"}
    asked = urllib.request.Request(address, json.dumps(body).encode(), headers)  # noqa: S310 - a loopback address
    urllib.request.urlopen(asked, timeout=30).close()  # noqa: S310


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(address, timeout=1):  # noqa: S310 - a loopback address
                return
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
    raise AssertionError(f"nothing answers at {address}: {log.read_text()}")
