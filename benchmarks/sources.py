"""How fast models come from each remote kind of source, against the usual client of each and ``sha256sum``.

``ORAS_PYTHON=… python benchmarks/sources.py [GIGABYTES [KIND]…]`` keeps a model of 4 GB, if not told otherwise, in
files of 250 MB on loopback in moto's S3 (``s3``), in emulators of Google's and Azure's storage (``gs``, ``az``), in an
MLflow server (``mlflow``) and in Debian's docker-registry (``oci``), and fetches it in turns, three times each:

- ``slipway``: `pipeline.sources.source.pull`, in a process of its own, every byte hashed while it streams;
- ``boto3`` (``download_file`` of each object), ``get`` of ``gcsfs`` or ``adlfs``, ``mlflow artifacts download`` or the
  pull of ``oras``, followed by ``sha256sum`` of each file. ``oras`` is PyPI's package, in the environment whose Python
  is ``ORAS_PYTHON``; without that variable it is left out.

It prints the best of three of each, their ratio, the greatest memory of ``slipway``, and how fast the same server
sends the bytes to ``curl``, which discards them: what is close to that can't be faster. Files are not larger because
moto reads a whole object for each range that boto3 asks for: of 1 GB each, boto3 gave up.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
_FILE = 0.25  # gigabytes
sys.path[:1] = [str(CHECKOUT), str(CHECKOUT / "tests")]  # not this folder, whose `stages` is another

import mlflow  # noqa: E402
from real_server import (  # noqa: E402
    AWS,
    BUCKET,
    az_server,
    azurite_connection,
    gs_server,
    mlflow_server,
    s3_server,
)

from benchmarks.random_files import write_random  # noqa: E402
from containers.image.distribution import Registry  # noqa: E402
from containers.image.oci import EMPTY, MANIFEST  # noqa: E402
from registry.digests import canonical_json, digest_file  # noqa: E402
from stages import loopback_registry  # noqa: E402

SLIPWAY = """
import sys
from pathlib import Path
from pipeline.sources.contents import Contents
from pipeline.sources.origin import Access
from pipeline.sources.source import pull, resolve
_, uri, tracking, target = sys.argv
anything = Contents(lambda uri, names, index: names, lambda name, weights: name in weights,
                    lambda uri, names: None, lambda folder, progress: None)
Path(target).mkdir()
found = resolve(uri, access=Access(tracking_uri=tracking), contents=anything)
pull(found, Path(target), Path(target + "-parts"), print)
print(int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024)
"""
BOTO3 = """
import sys
from pathlib import Path
import boto3
_, bucket, prefix, target = sys.argv
client = boto3.client("s3")
Path(target).mkdir()
for each in client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]:
    client.download_file(bucket, each["Key"], f"{target}/{Path(each['Key']).name}")
"""
FSSPEC = """
import sys
import fsspec
_, scheme, place, target = sys.argv
client = fsspec.filesystem(scheme)
client.get(place, target, recursive=True)
"""
ORAS = """
import sys
from oras.client import OrasClient
_, target, outdir = sys.argv
OrasClient(insecure=True).pull(target=target, outdir=outdir)
"""


def main(gigabytes: float, kinds: Sequence[str]) -> None:
    """Run all of it, or these ``kinds``, and print one line a figure."""
    compared = {"s3": _s3, "gs": _gs, "az": _az, "mlflow": _mlflow, "oci": _oci}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = max(1, round(gigabytes / _FILE))
        files = [
            write_random(folder / f"model-{n + 1:05}-of-{count:05}.safetensors", int(gigabytes * 1e9 / count))
            for n in range(count)
        ]
        for kind in kinds or compared:
            place = folder / kind
            place.mkdir()
            compared[kind](files, place, gigabytes)
            shutil.rmtree(place)


def _s3(files: list[Path], folder: Path, gigabytes: float) -> None:
    import boto3

    with s3_server(folder) as address:
        os.environ.update({**AWS, "AWS_ENDPOINT_URL": address})
        client = boto3.client("s3")
        for path in files:
            client.upload_file(str(path), BUCKET, f"model/{path.name}")
        addresses = [
            client.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": f"model/{path.name}"})
            for path in files
        ]
        theirs = [sys.executable, "-c", BOTO3, BUCKET, "model/"]
        _compare("s3", f"s3://{BUCKET}/model", "", ("boto3", theirs), addresses, folder, gigabytes)


def _gs(files: list[Path], folder: Path, gigabytes: float) -> None:
    from gcsfs.core import GCSFileSystem

    with gs_server(folder) as address:
        os.environ.update({"STORAGE_EMULATOR_HOST": address, "NO_GCE_CHECK": "true"})
        os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # it asks the emulator over gRPC, for a minute
        client = GCSFileSystem(token="anon")  # noqa: S106 - nobody
        client.call("POST", "b", json={"name": BUCKET})
        for path in files:
            client.put_file(str(path), f"{BUCKET}/model/{path.name}")
        addresses = [client.url(f"{BUCKET}/model/{path.name}") for path in files]
        theirs = [sys.executable, "-c", FSSPEC, "gs", f"{BUCKET}/model"]
        _compare("gs", f"gs://{BUCKET}/model", "", ("gcsfs", theirs), addresses, folder, gigabytes)


def _az(files: list[Path], folder: Path, gigabytes: float) -> None:
    from adlfs import AzureBlobFileSystem

    with az_server(folder) as address:
        os.environ["AZURE_STORAGE_CONNECTION_STRING"] = azurite_connection(address)
        client = AzureBlobFileSystem()
        client.mkdir(BUCKET)
        for path in files:
            client.put_file(str(path), f"{BUCKET}/model/{path.name}")
        account = f"{address}/devstoreaccount1/{BUCKET}/model"
        signed = {path.name: client.url(f"{BUCKET}/model/{path.name}", expires=86_400) for path in files}
        addresses = [f"{account}/{name}?{url.partition('?')[2]}" for name, url in signed.items()]
        theirs = [sys.executable, "-c", FSSPEC, "az", f"{BUCKET}/model"]
        _compare("az", f"az://{BUCKET}/model", "", ("adlfs", theirs), addresses, folder, gigabytes)


def _mlflow(files: list[Path], folder: Path, gigabytes: float) -> None:
    options = ["--artifacts-destination", str(folder / "artifacts")]
    with mlflow_server(folder / "server", f"sqlite:///{folder}/mlflow.db", options, {}) as address:
        client = mlflow.MlflowClient(address)
        run = client.create_run("0")
        for path in files:
            client.log_artifact(run.info.run_id, str(path), "model")
        below = run.info.artifact_uri.removeprefix("mlflow-artifacts:/")
        addresses = [f"{address}/api/2.0/mlflow-artifacts/artifacts/{below}/model/{path.name}" for path in files]
        command = [sys.executable, "-m", "mlflow", "artifacts", "download", "-r", run.info.run_id, "-a", "model", "-d"]
        os.environ["MLFLOW_TRACKING_URI"] = address
        uri = f"runs:/{run.info.run_id}/model"
        _compare("mlflow", uri, address, ("mlflow artifacts download", command), addresses, folder, gigabytes)


def _oci(files: list[Path], folder: Path, gigabytes: float) -> None:
    oras = os.environ.get("ORAS_PYTHON")
    with loopback_registry.serving(folder) as address, Registry(address) as registry:
        layers = []
        for path in files:
            digest = f"sha256:{digest_file(path)}"
            with path.open("rb") as stream:
                registry.upload("model", iter(lambda: stream.read(1 << 20), b""), path.stat().st_size, digest)
            layers.append({
                "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": path.stat().st_size,
                "annotations": {"org.opencontainers.image.title": path.name},
            })  # fmt: skip
        config = {"mediaType": EMPTY, "digest": registry.put_blob("model", b"{}"), "size": 2}
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers}
        registry.put_manifest("model", "v1", canonical_json(manifest), MANIFEST)
        addresses = [f"http://{address}/v2/model/blobs/{layer['digest']}" for layer in layers]
        theirs = [oras, "-c", ORAS, f"{address}/model:v1"] if oras else None
        _compare("oci", f"oci://{address}/model:v1", "", ("oras", theirs), addresses, folder, gigabytes)


def _compare(
    name: str, uri: str, tracking: str, other: tuple[str, list[str] | None], addresses: list[str], folder: Path,
    gigabytes: float,
) -> None:  # fmt: skip
    peaks: list[float] = []

    def slipway(target: Path) -> None:
        said = _run([sys.executable, "-c", SLIPWAY, uri, tracking, str(target)])
        peaks.append(float(said.splitlines()[-1]))

    def theirs(target: Path) -> None:
        _run([*(other[1] or ()), str(target)])
        _run(["bash", "-c", f"find {target} -type f -exec sha256sum {{}} +"])

    def curl(_: Path) -> None:
        for address in addresses:
            _run(["curl", "-sSf", "-o", "/dev/null", address])

    ways: dict[str, Callable[[Path], None]] = {"slipway": slipway, "curl to /dev/null": curl}
    if other[1] is not None:
        ways[f"{other[0]} + sha256sum"] = theirs
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(3):
        for way, fetch in ways.items():
            target = folder / "fetched"
            started = time.perf_counter()
            fetch(target)
            best[way] = min(best[way], time.perf_counter() - started)
            shutil.rmtree(target, ignore_errors=True)
    for way, seconds in best.items():
        print(f"{name}: {way}: {seconds:.2f} s, {gigabytes * 1000 / seconds:.0f} MB/s", flush=True)
    for way, seconds in best.items():
        if way != "slipway":
            print(f"{name}: slipway / {way}: {best['slipway'] / seconds:.2f}", flush=True)
    print(json.dumps({"source": name, "gigabytes": gigabytes, "peak_mb": round(max(peaks), 1)}), flush=True)


def _run(command: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 4.0, sys.argv[2:])
