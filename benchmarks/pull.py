"""How fast a release is pulled, verified, from an MLflow server: against MLflow's own download, and against curl.

``python benchmarks/pull.py [GIGABYTES]`` makes a signed release of eight files (4 GB together, if not told otherwise),
promotes it into an MLflow server of its own on loopback, and fetches it in turns, the page cache warm for all:

- ``pull``: `registry.pull`, in a process of its own, every byte hashed while it streams, fsynced at the end;
- ``mlflow``: ``mlflow artifacts download`` followed by ``sha256sum`` of each file;
- ``curl``: curl of the same addresses, as many at once as `pull` has connections, followed by ``sha256sum``, both as
  parallel as the cores (``xargs -P``).

It prints the best of three of each, the two ratios, the greatest memory that ``pull`` held, and what a pull moves when
one of the eight files changed.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests")]

from release_folder import FILES, make_release  # noqa: E402

from benchmarks.random_files import write_random  # noqa: E402
from registry.connect import open_backend  # noqa: E402
from registry.promote import promote  # noqa: E402
from registry.pull import CONNECTIONS  # noqa: E402
from registry.signing import load_or_create_key  # noqa: E402

PULL = """
import json, sys, time
from pathlib import Path
from registry import load_trusted_keys, pull
_, reference, target, uri, key, cache = sys.argv
started = time.perf_counter()
pulled = pull(reference, Path(target), tracking_uri=uri, trusted_keys=load_trusted_keys([Path(key)]),
              cache=Path(cache) if cache else None)
# getrusage would count what the parent held when it forked.
peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
print(json.dumps({"peak_mb": peak, "moved": pulled.fetched_bytes, "inside": time.perf_counter() - started}))
"""


def main(gigabytes: float, keep: Path | None) -> None:
    """Run all three and print one line a figure."""
    with tempfile.TemporaryDirectory(dir=keep) as name:
        folder = Path(name)
        key = load_or_create_key(folder / "keys" / "release.pem")
        weights = [write_random(folder / f"weights-{number}", int(gigabytes * 1e9 / 8)) for number in range(8)]
        release = _release(folder / "release", weights, key)
        with _server(folder) as uri:
            promote(release, uri, [key.public])
            with open_backend(uri) as backend:
                (version,) = backend.versions("demo-awq")
            public = str(folder / "keys" / "release.pub")
            addresses = [
                f"{uri}/api/2.0/mlflow-artifacts/artifacts{version.location.removeprefix('mlflow-artifacts:')}/{item}"
                for item in (path.relative_to(release).as_posix() for path in release.rglob("*") if path.is_file())
            ]
            peaks: list[float] = []

            def pull(target: Path) -> None:
                done = _run([sys.executable, "-c", PULL, "demo-awq", str(target), uri, public, ""])
                peaks.append(json.loads(done)["peak_mb"])

            def mlflow(target: Path) -> None:
                command = [sys.executable, "-m", "mlflow", "artifacts", "download", "-u", version.location, "-d"]
                _run([*command, str(target)], MLFLOW_TRACKING_URI=uri)
                _run(["bash", "-c", f"find {target} -type f -exec sha256sum {{}} +"])

            def curl(target: Path) -> None:
                target.mkdir()
                asked = "\n".join(f'url = "{address}"\noutput = "{target}/{n}"' for n, address in enumerate(addresses))
                (folder / "asked").write_text(asked)
                _run(
                    [
                        "curl",
                        "-sSf",
                        "--no-progress-meter",
                        "--parallel",
                        "--parallel-max",
                        str(CONNECTIONS),
                        "-K",
                        str(folder / "asked"),
                    ]
                )
                hashes = f"find {target} -type f -print0 | xargs -0 -n1 -P{os.cpu_count()} sha256sum"
                _run(["bash", "-c", hashes])

            ways: dict[str, Callable[[Path], None]] = {"pull": pull, "mlflow": mlflow, "curl": curl}
            best = dict.fromkeys(ways, float("inf"))
            for turn in range(3):
                for way, fetch in ways.items():
                    target = folder / "fetched"
                    os.sync()
                    started = time.perf_counter()
                    fetch(target)
                    seconds = time.perf_counter() - started
                    print(f"# turn {turn + 1}, {way}: {seconds:.1f} s", file=sys.stderr, flush=True)
                    best[way] = min(best[way], seconds)
                    shutil.rmtree(target)
            for way, seconds in best.items():
                print(f"{way}: {seconds:.2f} s, {gigabytes * 1000 / seconds:.0f} MB/s")
            print(f"mlflow / pull: {best['mlflow'] / best['pull']:.2f}")
            print(f"pull / curl: {best['pull'] / best['curl']:.2f}")
            print(f"peak memory of pull: {max(peaks):.0f} MB")
            cache = str(folder / "cache")
            _run([sys.executable, "-c", PULL, "demo-awq", str(folder / "first"), uri, public, cache])
            weights[3] = write_random(folder / "other", int(gigabytes * 1e9 / 8))
            promote(_release(folder / "second-release", weights, key, "2026-11-25T00:00:00Z"), uri, [key.public])
            done = json.loads(
                _run([sys.executable, "-c", PULL, "demo-awq", str(folder / "second"), uri, public, cache])
            )
            print(f"moved when one of eight changed: {done['moved'] / 1e6:.1f} MB in {done['inside']:.1f} s")


def _release(folder: Path, weights: list[Path], key: object, created: str = "2026-11-24T00:00:00Z") -> Path:
    folder.mkdir()
    for number, path in enumerate(weights):
        os.link(path, folder / f"model-{number + 1:05}-of-00008.safetensors")
    files = {name: data for name, data in FILES.items() if name != "model.safetensors"}
    make_release(folder, key, files=files, created=created)  # type: ignore[arg-type]
    return folder


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    """An MLflow server that keeps the files itself, one worker, as FACTS and compose have it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=1).close()  # noqa: S310 - a loopback address
                break
            except OSError:
                time.sleep(0.2)
        yield uri
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def _run(command: list[str], **environment: str) -> str:
    inherited = {
        **os.environ,
        "PYTHONPATH": str(CHECKOUT),
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        **environment,
    }
    return subprocess.run(command, env=inherited, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 4.0, Path(sys.argv[2]) if len(sys.argv) > 2 else None)
