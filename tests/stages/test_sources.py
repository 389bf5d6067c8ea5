"""Sources of every kind against real servers and emulators: pulled, resumed, locked, and refused in one line."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from model_places import AzPlace, GsPlace, MlflowPlace, OciPlace, Place, S3Place, open_places
from recording_server import Answer, recording

from homes import DEMO, make_home
from pipeline.errors import SourceError
from pipeline.planner.sources import describe
from pipeline.settings import Settings
from pipeline.sources import cloud_storage
from pipeline.sources.lock import read_lock
from pipeline.sources.origin import Access, open_origin
from pipeline.sources.s3 import open_prefix
from pipeline.sources.source import ResolvedSource, hold_to_lock, pull, resolve
from pipeline.spec import load
from pipeline.stages.context import StageContext
from pipeline.stages.run import run_until
from pipeline.store.artifacts import Artifact
from registry.server import MlflowServer
from unit.pipeline import checkpoints

KINDS = {
    "s3": "s3", "s3-versions": "s3", "gs": "gs", "az": "az", "mlflow": "mlflow", "mlflow-flavour": "mlflow",
    "oras": "oci", "modelpack": "oci", "modelcar": "oci",
}  # fmt: skip
"""Each kind of source, and the server that keeps it; the cases of hubs are in `unit/pipeline/test_source.py`."""
RELEASED = {**KINDS, "mlflow-run": "mlflow", "hub": "hub"}
BLOCK = 1 << 16  # what clients of other clouds read at once, so that the tiny model takes several


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], dict[str, Place]]]:
    """Starts each server when a test first wants it."""
    with contextlib.ExitStack() as stack:
        folder = tmp_path_factory.mktemp("servers")
        yield functools.cache(lambda name: stack.enter_context(open_places(name, folder / name)))


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, servers: Callable[[str], dict[str, Place]]) -> Place:
    return servers(KINDS[request.param])[request.param]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    model = checkpoints.write_source(tmp_path / "model")
    return {path.name: path.read_bytes() for path in sorted(model.iterdir())}


class Puller:
    """Pulls like the stage: into a new folder, with downloads and a lock that are kept."""

    def __init__(self, folder: Path, place: Place) -> None:
        self.folder, self.place, self.count = folder, place, 0
        self.lock = folder / "tiny.lock.json"
        self.lines: list[str] = []

    def resolve(self) -> ResolvedSource:
        return resolve(self.place.uri, access=self.place.access, lock=read_lock(self.lock))

    def pull(self) -> dict[str, str]:
        self.count += 1
        self.target = self.folder / f"pulled-{self.count}"
        self.target.mkdir()
        resolved = self.resolve()
        found = pull(resolved, self.target, self.folder / "downloads", self.lines.append)
        hold_to_lock(self.lock, resolved, found)
        return found

    def left(self) -> list[str]:
        """What is under the downloads, and in the folder that was pulled to last."""
        places = (self.folder / "downloads", self.target)
        return [path.name for place in places for path in place.rglob("*") if path.is_file()]


@pytest.fixture
def puller(place: Place, files: Mapping[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Puller:
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cloud_storage, "_BLOCK", BLOCK)
    place.put(files)
    place.proxy.cuts, place.proxy.after = 0, BLOCK // 2
    return Puller(tmp_path, place)


def digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def one_line(call: Callable[[], object]) -> str:
    with pytest.raises(SourceError) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said
    assert "testing" not in said  # the secret key of moto
    assert "Eby8vdM02x" not in said  # of azurite
    return said


def changed(files: Mapping[str, bytes]) -> dict[str, bytes]:
    weights = bytearray(files["model.safetensors"])
    weights[-1] ^= 1
    return {**files, "model.safetensors": bytes(weights)}


def test_a_model_is_planned_from_parts_pulled_and_locked(puller: Puller, files: Mapping[str, bytes]) -> None:
    described = describe(puller.resolve())
    assert described.model.architecture == "llama"
    assert described.bytes == sum(len(data) for data in files.values())
    assert puller.pull() == digests(files)
    lock = read_lock(puller.lock)
    assert lock is not None
    assert lock.revision is not None
    assert puller.pull() == digests(files)
    assert puller.resolve().fingerprint == lock.revision
    assert [path.name for path in (puller.folder / "downloads").rglob("*") if path.is_file()] == []


def test_a_download_that_is_cut_goes_on_where_it_stopped(puller: Puller, files: Mapping[str, bytes]) -> None:
    resolved = puller.resolve()
    (puller.folder / "new").mkdir()
    puller.place.proxy.received, puller.place.proxy.cuts = 0, 1
    found = pull(resolved, puller.folder / "new", puller.folder / "downloads", puller.lines.append)
    assert found == digests(files)
    assert puller.place.proxy.cuts == 0
    assert puller.place.proxy.received < sum(len(data) for data in files.values()) + 20_000 + BLOCK


def test_what_a_killed_pull_left_is_not_downloaded_again(puller: Puller, files: Mapping[str, bytes]) -> None:
    resolved = puller.resolve()
    (puller.folder / "new").mkdir()

    def stop(line: str) -> None:
        if line.startswith("tokenizer.json"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(resolved, puller.folder / "new", puller.folder / "downloads", stop)
    puller.place.proxy.received = 0
    assert pull(resolved, puller.folder / "new", puller.folder / "downloads", puller.lines.append) == digests(files)
    assert puller.place.proxy.received < len(files["model.safetensors"])


def test_a_byte_that_changed_after_locking_is_refused_or_the_locked_one_is_pulled(
    puller: Puller, files: Mapping[str, bytes]
) -> None:
    puller.pull()
    puller.place.put(changed(files))
    if not puller.place.keeps_versions:
        said = one_line(puller.pull)
        # Azure's ETags and Google's generations change even where the same bytes are written again.
        assert re.search(r"(config.json|model.safetensors) was overwritten after it was listed or locked", said)
        assert puller.left() == []
    else:  # a version, or a digest, is still there: the alias or the tag has moved away from it
        assert puller.pull() == digests(files)
        new = resolve(puller.place.uri, access=puller.place.access)
        assert new.fingerprint != puller.resolve().fingerprint


def test_a_name_that_leads_elsewhere_is_not_pulled(puller: Puller, files: Mapping[str, bytes]) -> None:
    places = {OciPlace: "../escaped.json", GsPlace: "deeper/escaped.json", AzPlace: "deeper/escaped.json"}
    name = places.get(type(puller.place), "a\\..\\escaped.json")  # not every place keeps every name
    puller.place.put({**files, name: b"{}"})
    assert puller.pull() == digests(files)
    assert (f"not pulled: {name}" in puller.lines) == (not name.startswith("deeper"))  # which is not the model's
    assert not list(puller.folder.rglob("*escaped*"))


@pytest.fixture(params=["gs", "az"])
def cloud(
    request: pytest.FixtureRequest,
    servers: Callable[[str], dict[str, Place]],
    files: Mapping[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    """A model in Google's or Azure's storage."""
    place = servers(KINDS[request.param])[request.param]
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    place.put(files)
    return place


def test_a_list_that_changes_while_a_cloud_gives_it_is_refused(cloud: Place, files: Mapping[str, bytes]) -> None:
    origin = cloud_storage.open_prefix(cloud.uri, None, cloud.access)
    listed = origin.client.ls

    def then_write(*words: str, **options: bool) -> object:
        found = listed(*words, **options)
        cloud.put({**files, "model-2.safetensors": b"new"})  # the emulator refuses an empty body
        return found

    origin.client.ls = then_write
    assert "its list of objects changed while it was read: run again" in one_line(origin.find)


def test_an_object_that_is_replaced_while_it_is_read_is_refused(
    cloud: Place, files: Mapping[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "new").mkdir()
    replaced: list[str] = []

    def replace_it(line: str) -> None:  # the second line of progress is in the middle of it
        if line.startswith("model.safetensors") and not replaced:
            replaced.append(line)
            cloud.put(changed(files))

    resolved = resolve(cloud.uri)
    said = one_line(lambda: pull(resolved, tmp_path / "new", tmp_path / "downloads", replace_it))
    assert "model.safetensors was overwritten after it was listed or locked" in said
    assert [path for path in (tmp_path / "downloads").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("place", ["none", "../other"])
def test_a_prefix_without_a_model_in_a_cloud_is_one_line(cloud: Place, place: str) -> None:
    scheme = cloud.uri.partition(":")[0]
    said = one_line(lambda: resolve(f"{scheme}://releases/{place}"))
    assert ("does not exist" if place == "none" else f"expected {scheme}://") in said


def test_credentials_that_a_cloud_refuses_are_named_and_leave_nothing(
    cloud: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = resolve(cloud.uri)
    with recording() as server:
        server.answer = lambda _: Answer(403, {"x-ms-error-code": "AuthenticationFailed"}, b"{}")
        for name, value in cloud.environment.items():
            monkeypatch.setenv(name, value.replace(f"http://{cloud.proxy.address}", server.address))
        assert "refused the credentials, or they have expired: renew them" in one_line(lambda: resolve(cloud.uri))
        late = replace(resolved, origin=cloud_storage.open_prefix(cloud.uri, None, cloud.access))
        (tmp_path / "new").mkdir()
        said = one_line(lambda: pull(late, tmp_path / "new", tmp_path / "downloads", lambda _: None))
        assert "config.json: " in said
        assert "refused the credentials, or they have expired" in said
    assert list(tmp_path.joinpath("downloads").rglob("*")) == []


def test_without_an_account_the_need_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    assert "account_name with credentials" in one_line(lambda: resolve("az://releases/model"))


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs.core"), ("az", "adlfs")])
def test_a_client_that_is_not_installed_is_named_with_its_extra(
    scheme: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert f"install `slipway[{scheme}]`" in one_line(lambda: resolve(f"{scheme}://releases/model"))


@pytest.fixture
def bucket(
    servers: Callable[[str], dict[str, Place]], files: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> Place:
    place = servers("s3")["s3"]
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    place.put(files)
    return place


def test_a_list_that_changes_while_it_is_read_is_refused(bucket: Place) -> None:
    origin = open_prefix(bucket.uri, None, bucket.access)

    def add(**_: object) -> None:
        assert isinstance(bucket, S3Place)
        bucket.client.put_object(Bucket=bucket.bucket, Key="models/tiny/model-2.safetensors", Body=b"")

    origin.client.meta.events.register("after-call.s3.HeadObject", add)
    assert "its list of objects changed while it was read: run again" in one_line(origin.find)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3://releases/models/none", "holds no objects"),
        ("s3://no-such-bucket/model", "s3://no-such-bucket/model does not exist"),
        ("s3://releases/../other", "expected s3://BUCKET/PREFIX"),
    ],
)
def test_a_prefix_without_a_model_is_one_line(bucket: Place, uri: str, reason: str) -> None:
    assert reason in one_line(lambda: resolve(uri))


def test_credentials_that_expire_are_named_and_leave_nothing(
    bucket: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = resolve(bucket.uri)
    body = b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>The token has expired.</Message></Error>"
    with recording() as server:
        server.answer = lambda _: Answer(400, {"Content-Type": "application/xml"}, body)
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
        assert "the AWS credentials have expired" in one_line(lambda: resolve(bucket.uri))
        late = replace(resolved, origin=open_prefix(bucket.uri, None, bucket.access))
        (tmp_path / "new").mkdir()
        said = one_line(lambda: pull(late, tmp_path / "new", tmp_path / "downloads", lambda _: None))
        assert "config.json: the AWS credentials have expired" in said
    assert list(tmp_path.joinpath("downloads").rglob("*")) == []


@pytest.mark.parametrize(
    ("kind", "renew"),
    [("hub", "HF_TOKEN"), ("mlflow", "MLFLOW_TRACKING_TOKEN"), ("oras", "docker login"), ("modelcar", "docker login")],
)
def test_credentials_that_expire_elsewhere_are_named_and_leave_nothing(
    kind: str, renew: str, servers: Callable[[str], dict[str, Place]], files: Mapping[str, bytes], tmp_path: Path
) -> None:
    place = servers(RELEASED[kind])[kind]
    place.put(files)
    resolved = resolve(place.uri, access=place.access)
    with recording() as server:
        server.answer = lambda _: Answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})

        def refusing(address: str) -> str:
            return address.replace(place.proxy.address, server.address.removeprefix("http://"))

        uri, there = refusing(place.uri), place.access
        access = Access(refusing(there.hub_endpoint), "hf_expired", refusing(there.tracking_uri))
        assert renew in one_line(lambda: resolve(uri, access=access))
        late = replace(resolved, origin=open_origin(uri, None, access))
        (tmp_path / "new").mkdir()
        said = one_line(lambda: pull(late, tmp_path / "new", tmp_path / "downloads", lambda _: None))
        assert renew in said
        assert "hf_expired" not in said
    assert list(tmp_path.joinpath("downloads").rglob("*")) == []


def test_a_list_that_changes_while_mlflow_gives_it_is_refused(
    servers: Callable[[str], dict[str, Place]], files: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = servers("mlflow")["mlflow"]
    assert isinstance(place, MlflowPlace)
    place.put(files)
    listed = MlflowServer.list_proxied

    def then_write(server: MlflowServer, path: str) -> object:
        found = listed(server, path)
        place.client.log_text(place.run, "{}", "weights/late.json")
        return found

    monkeypatch.setattr(MlflowServer, "list_proxied", then_write)
    said = one_line(lambda: resolve(place.uri, access=place.access))
    assert "its list of files changed while it was read: run again" in said


def test_without_credentials_the_variables_are_named(bucket: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in one_line(lambda: resolve(bucket.uri))


def test_a_run_of_mlflow_is_a_source_too(
    servers: Callable[[str], dict[str, Place]], files: Mapping[str, bytes], tmp_path: Path
) -> None:
    place = servers("mlflow")["mlflow"]
    assert isinstance(place, MlflowPlace)
    place.put(files)
    resolved = resolve(f"runs:/{place.run}/weights", access=place.access)
    assert pull(resolved, tmp_path, tmp_path / "downloads", lambda _: None) == digests(files)
    assert "has no alias `none`: it has `chosen`" in one_line(
        lambda: resolve("models:/plain@none", access=place.access)
    )
    assert "has no registered model `x`" in one_line(lambda: resolve("models:/x@a", access=place.access))
    assert "has no version 99" in one_line(lambda: resolve("models:/plain/99", access=place.access))


def test_a_tag_whose_locked_digest_is_gone_is_one_line(
    servers: Callable[[str], dict[str, Place]], files: Mapping[str, bytes], tmp_path: Path
) -> None:
    place = servers("oci")["oras"]
    place.put(files)
    puller = Puller(tmp_path, place)
    puller.pull()
    elsewhere = place.uri.replace("models/oras", "models/other")
    puller.lock.write_text(puller.lock.read_text().replace(place.uri, elsewhere))
    said = one_line(lambda: pull(
        resolve(elsewhere, lock=read_lock(puller.lock)), tmp_path, tmp_path / "downloads", lambda _: None
    ))  # fmt: skip
    assert "answers 404" in said
    assert list(tmp_path.joinpath("downloads").rglob("*")) == []
    assert "has no `v9`" in one_line(lambda: resolve(place.uri.replace(":v1", ":v9")))
    assert "names neither a tag nor a digest" in one_line(lambda: resolve("oci://127.0.0.1:1/name"))


def test_compressed_layers_are_refused_with_what_to_do(
    servers: Callable[[str], dict[str, Place]], files: Mapping[str, bytes]
) -> None:
    place = servers("oci")["modelcar"]
    assert isinstance(place, OciPlace)
    place.put(files, compressed="gz")
    assert "1 compressed layers, which can't be read in parts: push the files" in one_line(lambda: resolve(place.uri))


@pytest.mark.long
@pytest.mark.parametrize("kind", RELEASED)
def test_the_demo_from_every_kind_of_source_is_quantized_and_checked_and_then_downloads_nothing(
    kind: str,
    servers: Callable[[str], dict[str, Place]],
    machine: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = servers(RELEASED[kind])[kind]
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    place.put({path.name: path.read_bytes() for path in (DEMO / "model").iterdir()})
    model = tmp_path / "models" / "demo.yaml"
    model.parent.mkdir()
    document = yaml.safe_load((DEMO.parent / "demo.yaml").read_text().replace("file:demo/", f"file:{DEMO}/"))
    document |= {"source": {"uri": place.uri}, "schemes": {"fp8": {"method": "fp8", "backend": "llmcompressor"}}}
    model.write_text(yaml.safe_dump(document))
    variables = make_home(tmp_path / "home", machine)
    read = Settings.read(variables)
    settings = replace(
        read,
        tracking_uri=place.access.tracking_uri or read.tracking_uri,
        hub_endpoint=place.access.hub_endpoint,
    )

    def release() -> dict[str, Artifact]:
        place.proxy.received = 0
        return run_until("quantized", StageContext(load(model), "fp8", settings, lambda _: None))

    first = release()
    assert place.proxy.received > first["source"].size_bytes
    second = release()
    assert place.proxy.received == 0
    assert {name: (made.digest, made.cached) for name, made in second.items()} == {
        name: (made.digest, True) for name, made in first.items()
    }
