"""Places where models are kept, each a real server or an emulator on loopback, for tests of sources."""

from __future__ import annotations

import io
import tarfile
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import boto3
import mlflow
from cutting_proxy import CuttingProxy, cutting
from real_server import AWS, BUCKET, az_server, azurite_connection, gs_server, mlflow_server, s3_server

from containers.image.distribution import Registry
from containers.image.oci import EMPTY, MANIFEST
from pipeline.sources.origin import Access
from registry.digests import canonical_json
from stages import loopback_registry
from unit.pipeline import hub_server

SAFETENSORS = "model.safetensors"


class Place(Protocol):
    """Keeps one model at a time.

    Attributes:
        uri: the source's URI.
        access: how it is reached.
        environment: the standard variables for it.
        proxy: what is between it and its clients.
        keeps_versions: whether files that were replaced can still be read.
    """

    keeps_versions: bool
    uri: str
    access: Access
    environment: Mapping[str, str]
    proxy: CuttingProxy

    def put(self, files: Mapping[str, bytes]) -> None:
        """Keep these files under the URI, in place of what is there."""
        ...


class S3Place:
    """moto's S3, in a bucket with or without versions."""

    def __init__(self, address: str, proxy: CuttingProxy, *, versions: bool) -> None:
        self.bucket, self.keeps_versions = "versions" if versions else BUCKET, versions
        self.uri, self.access, self.proxy = f"s3://{self.bucket}/models/tiny", Access(), proxy
        self.environment: Mapping[str, str] = {**AWS, "AWS_ENDPOINT_URL": f"http://{proxy.address}"}
        self.client: Any = boto3.client(
            "s3", endpoint_url=address, aws_access_key_id="testing", aws_secret_access_key="testing",  # noqa: S106 - moto's
            region_name="us-east-1",
        )  # fmt: skip
        self.client.create_bucket(Bucket=self.bucket)
        if versions:
            self.client.put_bucket_versioning(Bucket=self.bucket, VersioningConfiguration={"Status": "Enabled"})

    def put(self, files: Mapping[str, bytes]) -> None:
        for each in self.client.list_objects_v2(Bucket=self.bucket).get("Contents", ()):
            self.client.delete_object(Bucket=self.bucket, Key=each["Key"])
        for name, data in files.items():
            self.client.put_object(Bucket=self.bucket, Key=f"models/tiny/{name}", Body=data)


class GsPlace:
    """An emulator of Google Cloud Storage, which keeps no generation but the last."""

    keeps_versions = False

    def __init__(self, address: str, proxy: CuttingProxy) -> None:
        from gcsfs.core import GCSFileSystem  # noqa: PLC0415 - of an extra

        self.address = address
        self.uri, self.access, self.proxy = f"gs://{BUCKET}/models/tiny", Access(), proxy
        # Without credentials the client goes on as nobody; it does not look for a server of Google's machines.
        self.environment: Mapping[str, str] = {
            "STORAGE_EMULATOR_HOST": f"http://{proxy.address}",
            "NO_GCE_CHECK": "true",
        }
        self.client: Any = GCSFileSystem(endpoint_url=address, token="anon", use_listings_cache=False)  # noqa: S106 - nobody
        self.client.call("POST", "b", json={"name": BUCKET})

    def put(self, files: Mapping[str, bytes]) -> None:
        for path in self.client.find(BUCKET):
            self.client.rm_file(path)
        for name, data in files.items():
            where = f"{self.address}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name=models/tiny/{quote(name)}"
            urllib.request.urlopen(urllib.request.Request(where, data), timeout=30).close()  # noqa: S310 - a loopback address


class AzPlace:
    """Azurite, whose containers have no versions."""

    keeps_versions = False

    def __init__(self, address: str, proxy: CuttingProxy) -> None:
        from azure.storage.blob import BlobServiceClient  # noqa: PLC0415 - of an extra

        self.uri, self.access, self.proxy = f"az://{BUCKET}/models/tiny", Access(), proxy
        self.environment: Mapping[str, str] = {
            "AZURE_STORAGE_CONNECTION_STRING": azurite_connection(f"http://{proxy.address}")
        }
        service = BlobServiceClient.from_connection_string(azurite_connection(address))
        self.client: Any = service.create_container(BUCKET)

    def put(self, files: Mapping[str, bytes]) -> None:
        for name in self.client.list_blob_names():
            self.client.delete_blob(name)
        for name, data in files.items():
            self.client.upload_blob(f"models/tiny/{name}", data)


class HubPlace:
    """The stand-in for a hub, at one commit, whatever is put there."""

    keeps_versions = False

    def __init__(self, hub: hub_server.StandInHub, proxy: CuttingProxy) -> None:
        self.hub, self.proxy, self.uri = hub, proxy, f"hf://{hub_server.REPOSITORY}"
        self.access = Access(hub_endpoint=f"http://{proxy.address}")
        self.environment: Mapping[str, str] = {}

    def put(self, files: Mapping[str, bytes]) -> None:
        self.hub.files = dict(files)


class MlflowPlace:
    """A server of MLflow, which hands the files out; each `put` is a new version, with the alias `chosen`.

    The model is in the transformers flavour, or plain files; its URI is that of the alias, or of the last `run`.
    """

    keeps_versions = True

    def __init__(self, address: str, folder: Path, proxy: CuttingProxy, kind: str) -> None:
        self.name, self.proxy, self.folder = kind, proxy, folder
        self.uri, self.flavour = f"models:/{kind}@chosen", kind == "flavoured"
        self.access = Access(tracking_uri=f"http://{proxy.address}")
        self.environment: Mapping[str, str] = {}
        self.client = mlflow.MlflowClient(address, address)
        self.experiment = self.client.create_experiment(self.name)
        self.client.create_registered_model(self.name)
        self.run, self.versions = "", 0

    def put(self, files: Mapping[str, bytes]) -> None:
        self.versions += 1
        place = self.folder / str(self.versions)
        run = self.client.create_run(self.experiment)
        self.run = run.info.run_id
        for name, data in files.items():
            below = place
            if self.flavour:
                below = place / (
                    "components/tokenizer" if name.startswith(("tokenizer", "vocab", "merges")) else "model"
                )
            below.mkdir(parents=True, exist_ok=True)
            (below / name).write_bytes(data)
        if self.flavour:
            mlflow.models.Model(flavors={"transformers": {"task": "text-generation"}}).save(str(place / "MLmodel"))
        self.client.log_artifacts(self.run, str(place), "weights")
        source = f"{run.info.artifact_uri}/weights"
        version = self.client.create_model_version(self.name, source, self.run)
        self.client.set_registered_model_alias(self.name, "chosen", version.version)
        if self.name == "run":
            self.uri = f"runs:/{self.run}/weights"


class OciPlace:
    """Debian's docker-registry; the form of the artifact is that of ORAS, of ModelPack or of KServe's ModelCar."""

    keeps_versions = True

    def __init__(self, address: str, proxy: CuttingProxy, form: str) -> None:
        self.address, self.proxy, self.form = address, proxy, form
        self.repository = f"models/{form}"
        self.uri, self.access = f"oci://{proxy.address}/{self.repository}:v1", Access()
        self.environment: Mapping[str, str] = {}

    def put(self, files: Mapping[str, bytes], compressed: str = "") -> None:
        with Registry(self.address) as registry:
            layers = [self._layer(registry, name, data) for name, data in files.items()]
            if self.form == "modelcar":
                layers = [self._archive(registry, files, compressed)]
            config = {"mediaType": EMPTY, "digest": registry.put_blob(self.repository, b"{}"), "size": 2}
            manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers}
            registry.put_manifest(self.repository, "v1", canonical_json(manifest), MANIFEST)

    def _layer(self, registry: Registry, name: str, data: bytes) -> dict[str, Any]:
        key, kind = {
            # What `oras push` gives files whose type is not named.
            "oras": ("org.opencontainers.image.title", "application/vnd.oci.image.layer.v1.tar"),
            "modelpack": ("org.cncf.model.filepath", "application/vnd.cncf.model.weight.v1.raw"),
            "modelcar": ("", ""),
        }[self.form]
        digest = registry.put_blob(self.repository, data)
        return {"mediaType": kind, "digest": digest, "size": len(data), "annotations": {key: name}}

    def _archive(self, registry: Registry, files: Mapping[str, bytes], compressed: str) -> dict[str, Any]:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode=f"w:{compressed}") as archive:  # type: ignore[call-overload]
            for name, data in {"etc/os-release": b"ID=none\n", **{f"models/{n}": d for n, d in files.items()}}.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        data = packed.getvalue()
        kind = f"application/vnd.oci.image.layer.v1.tar{'+gzip' if compressed else ''}"
        return {"mediaType": kind, "digest": registry.put_blob(self.repository, data), "size": len(data)}


@contextmanager
def open_places(server: str, folder: Path) -> Iterator[dict[str, Place]]:
    """Start a server, `hub`, `s3`, `gs`, `az`, `mlflow` or `oci`; yield the places in it, one a form of its sources."""
    folder.mkdir(parents=True, exist_ok=True)
    if server == "hub":
        with hub_server.serving({}) as hub, cutting(hub.endpoint.removeprefix("http://")) as proxy:
            yield {"hub": HubPlace(hub, proxy)}
    elif server == "s3":
        with s3_server(folder) as address, cutting(address.removeprefix("http://")) as proxy:
            yield {
                "s3": S3Place(address, proxy, versions=False),
                "s3-versions": S3Place(address, proxy, versions=True),
            }
    elif server == "gs":
        with gs_server(folder) as address, cutting(address.removeprefix("http://")) as proxy:
            yield {"gs": GsPlace(address, proxy)}
    elif server == "az":
        with az_server(folder) as address, cutting(address.removeprefix("http://")) as proxy:
            yield {"az": AzPlace(address, proxy)}
    elif server == "mlflow":
        options = ["--artifacts-destination", str(folder / "artifacts")]
        store = f"sqlite:///{folder}/mlflow.db"
        with (
            mlflow_server(folder / "server", store, options, {}) as address,
            cutting(address.removeprefix("http://")) as proxy,
        ):
            kinds = {"mlflow": "plain", "mlflow-flavour": "flavoured", "mlflow-run": "run"}
            yield {name: MlflowPlace(address, folder / kind, proxy, kind) for name, kind in kinds.items()}
    else:
        with loopback_registry.serving(folder) as address, cutting(address) as proxy:
            yield {form: OciPlace(address, proxy, form) for form in ("oras", "modelpack", "modelcar")}
