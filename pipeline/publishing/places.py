"""Places where a release can be published: a model hub, a bucket, a container registry, a folder.

Each lists and reads what is there like a registered version (`registry.version_files.Artifacts`), and writes a release
so that its manifest appears last or together with all else: what was cancelled is not a release.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from containers.image.distribution import Registry
from containers.image.oci import EMPTY
from containers.image.oci import MANIFEST as OCI_MANIFEST
from containers.image.weights import RELEASE_DIGEST
from pipeline.errors import PublishError
from pipeline.publishing.card import NAME as CARD
from pipeline.settings import Settings
from pipeline.sources.oci import OciArtifact
from pipeline.sources.origin import Access, Chunks, Origin, SourceFile, open_origin
from registry import seal
from registry.bounded_json import Bounds, DocumentError, read_json
from registry.counting import Counter
from registry.digests import canonical_json, digest_file, digest_of
from registry.download import Reader
from registry.manifest import MANIFEST
from registry.progress import Progress
from registry.s3 import S3Artifacts
from registry.version_files import LocalArtifacts

KIND = "application/vnd.slipway.release.v1"
_TITLE = "org.opencontainers.image.title"
_FILE = "application/octet-stream"
_CHUNK = 1 << 20
_DOCUMENT = Bounds(bytes=4 << 20, values=200_000)
_HUB = re.compile(r"hf://(?P<repository>[^/@]+/[^/@]+)(?:@(?P<branch>[^@]+))?")
_BUCKET = re.compile(r"s3://(?P<bucket>[a-z0-9.-]+)/(?P<prefix>[^\s]+?)/?")
OCI = re.compile(
    r"oci://(?P<host>[^/@]+)/(?P<repository>[a-z0-9._/-]+?)(?::(?P<tag>[\w.-]+))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
"""An image or artifact in a container registry."""
# What a hub makes with a repository; neither this nor the card is part of the release.
BESIDE = frozenset({".gitattributes", CARD})


class Place(Protocol):
    """A place, with what is there now."""

    def names(self) -> list[str]:
        """List every file."""
        ...

    def open(self, name: str, start: int = 0) -> Any:  # noqa: ANN401 - as `registry.version_files.Artifacts` has it
        """Read a file from a byte on."""
        ...

    def write(self, files: Mapping[str, Path], progress: Progress) -> None:
        """Publish these files (path in the release → where it is)."""
        ...


@dataclass(frozen=True)
class ReleaseFiles:
    """A place without what lies beside the release: what `registry.pull` reads."""

    place: Place

    def names(self) -> list[str]:
        """List the files of the release."""
        return [name for name in self.place.names() if name not in BESIDE]

    def open(self, name: str, start: int = 0) -> Any:  # noqa: ANN401 - as above
        """Read a file from a byte on."""
        return self.place.open(name, start)


def is_place(reference: str) -> bool:
    """Whether a reference is the URI of a place, and not the name of a release."""
    return reference.startswith(("hf://", "s3://", "oci://", "file:"))


@contextmanager
def opened(uri: str, settings: Settings) -> Iterator[Place]:
    """Open a place.

    Raises:
        PublishError: it is not a valid place, does not exist, or refuses.
    """
    hub, bucket, oci = (pattern.fullmatch(uri) for pattern in (_HUB, _BUCKET, OCI))
    if hub:
        access, branch = Access.of(settings), hub["branch"] or "main"
        yield _HubPlace(hub["repository"], branch, access, open_origin(f"hf://{hub['repository']}", branch, access))
    elif bucket:
        with S3Artifacts.opened(bucket["bucket"], bucket["prefix"]) as stored:
            yield _BucketPlace(bucket["bucket"], bucket["prefix"], stored)
    elif oci:
        with Registry(oci["host"]) as registry:
            yield _oci_place(registry, oci["repository"], oci["tag"] or "latest", oci["digest"])
    elif uri.startswith("file:") and (folder := Path(uri.removeprefix("file:")).absolute()).name:
        yield _FolderPlace(folder)
    else:
        raise PublishError(
            f"can't publish to `{uri}`: expected hf://ORG/NAME[@BRANCH], s3://BUCKET/PREFIX, oci://HOST/NAME[:TAG] or "
            "file:FOLDER"
        )


class _FolderPlace:
    """A folder of this machine, or of a file system that others share: it appears when it is whole."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stored = folder, LocalArtifacts(folder)

    def names(self) -> list[str]:
        return self._stored.names()

    def open(self, name: str, start: int = 0) -> Any:  # noqa: ANN401
        return self._stored.open(name, start)

    def write(self, files: Mapping[str, Path], progress: Progress) -> None:
        progress(f"writing {len(files)} files")
        try:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".publish-", dir=self._folder.parent) as temporary:
                whole = Path(temporary) / self._folder.name
                whole.mkdir()
                seal.place(files, whole)
                whole.rename(self._folder)
        except OSError as error:
            raise PublishError(f"file:{self._folder} can't be written: {error.strerror}") from error


class _HubPlace:
    """A repository on a hub: one commit."""

    def __init__(self, repository: str, branch: str, access: Access, origin: Origin) -> None:
        self._repository, self._branch, self._access, self._origin = repository, branch, access, origin
        self._found = origin.find()
        self._files: dict[str, SourceFile] = {file.path: file for file in self._found.files}

    def names(self) -> list[str]:
        return sorted(self._files)

    def open(self, name: str, start: int = 0) -> Any:  # noqa: ANN401
        return self._origin.open(self._found.revision, self._files[name], start)

    def write(self, files: Mapping[str, Path], progress: Progress) -> None:
        import httpx2  # noqa: PLC0415 - as below
        from huggingface_hub import CommitOperationAdd, HfApi, constants  # noqa: PLC0415 - its import takes a third of a second
        from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415
        from huggingface_hub.utils import disable_progress_bars  # noqa: PLC0415

        self._check_card(files[CARD].read_text(), progress)
        disable_progress_bars()
        # Xet's client knows neither our proxies nor our certificates; a hub takes large files over HTTP too.
        constants.HF_HUB_DISABLE_XET = True
        api = HfApi(endpoint=self._access.hub_endpoint, token=self._access.hub_token or False)
        additions = [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())]
        try:
            with Counter(
                progress, "uploading", sum(path.stat().st_size for path in files.values()) / 1e6, "MB"
            ) as sent:
                for addition in additions:  # large files first, which no commit names yet
                    api.preupload_lfs_files(self._repository, [addition], revision=self._branch)
                    sent.add(addition.upload_info.size / 1e6, addition.path_in_repo)
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Warnings while validating metadata")  # shown by _check_card
                    api.create_commit(
                        self._repository,
                        additions,
                        commit_message="Publish a signed release",
                        revision=self._branch,
                        parent_commit=self._found.revision,
                    )
        except HfHubHTTPError as error:
            status = error.response.status_code
            raise PublishError(
                f"the hub refused hf://{self._repository}@{self._branch} with status {status}: HF_TOKEN must belong to "
                "an account that may write there, and nothing else may have been committed meanwhile"
            ) from error
        except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
            raise PublishError(
                f"hf://{self._repository} can't be written: {type(error).__name__}; run again"
            ) from error

    def _check_card(self, card: str, progress: Progress) -> None:
        """Let the hub check the card's metadata before gigabytes are uploaded; its client does so after that."""
        from pipeline.sources.hub import Hub  # noqa: PLC0415 - as above

        hub = Hub(self._access.hub_endpoint, self._access.hub_token)
        errors, warned = hub.check_card(self._repository, self._branch, card)
        for warning in warned:
            progress(f"the hub warns of the model card: {warning}")
        if errors:
            raise PublishError(f"the hub refuses the model card for hf://{self._repository}: {'; '.join(errors)}")


class _BucketPlace:
    """A prefix in a bucket: the manifest is the last object, and written only where there is none."""

    def __init__(self, bucket: str, prefix: str, stored: S3Artifacts) -> None:
        self._bucket, self._prefix, self._stored = bucket, prefix, stored

    def names(self) -> list[str]:
        return self._stored.names()

    def open(self, name: str, start: int = 0) -> Any:  # noqa: ANN401
        return self._stored.open(name, start)

    def write(self, files: Mapping[str, Path], progress: Progress) -> None:
        from boto3.exceptions import Boto3Error  # noqa: PLC0415 - for those who have S3

        try:
            self._upload(files, progress)
        except Boto3Error as error:
            raise PublishError(f"s3://{self._bucket}/{self._prefix} can't be written: {error}; run again") from error

    def _upload(self, files: Mapping[str, Path], progress: Progress) -> None:
        client, there = self._stored.client, set(self.names())
        with _counter(files, progress) as sent:
            for name, path in sorted(files.items(), key=lambda item: (item[0] == MANIFEST, item[0] == CARD)):
                at = {"Bucket": self._bucket, "Key": f"{self._prefix}/{name}"}
                metadata = {"sha256": digest_file(path)}
                if name == MANIFEST:
                    client.put_object(**at, Body=path.read_bytes(), Metadata=metadata, IfNoneMatch="*")
                elif name in there:  # of an upload that was cut off
                    if client.head_object(**at)["Metadata"].get("sha256") != metadata["sha256"]:
                        raise PublishError(f"s3://{self._bucket}/{self._prefix}/{name} is something else: remove it")
                    sent.add(path.stat().st_size / 1e6)
                else:
                    client.upload_file(
                        str(path), **at, ExtraArgs={"Metadata": metadata}, Callback=lambda count: sent.add(count / 1e6)
                    )


class OciPlace:
    """A tag in a container registry: a layer for each file, as `oras pull` expects them; the manifest is the last.

    ``digest`` is that of the manifest, once there is one.
    """

    def __init__(self, registry: Registry, repository: str, tag: str, found: bytes | None) -> None:
        self.registry, self.repository = registry, repository
        self.digest = None if found is None else digest_of(found)
        self._tag = tag
        self._layers = {} if found is None else self._listed(found)

    def names(self) -> list[str]:
        """List every file."""
        return sorted(self._layers)

    @contextmanager
    def open(self, name: str, start: int = 0) -> Iterator[tuple[Reader, int]]:  # noqa: ARG002 - it begins at the first byte
        """Read a file."""
        layer = self._layers[name]
        yield Chunks(self.registry.blob(self.repository, layer["digest"], layer["size"])), 0

    def write(self, files: Mapping[str, Path], progress: Progress) -> None:
        """Publish these files (path in the release → where it is)."""
        layers = []
        with _counter(files, progress) as sent:
            for name, path in sorted(files.items()):
                digest, size = f"sha256:{digest_file(path)}", path.stat().st_size
                if not self.registry.has(self.repository, digest):
                    self.registry.upload(self.repository, _chunks(path), size, digest)
                sent.add(size / 1e6, name)
                layers.append({"mediaType": _FILE, "digest": digest, "size": size, "annotations": {_TITLE: name}})
            empty = b"{}"
            self.registry.put_blob(self.repository, empty)
            manifest = {
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "artifactType": KIND,
                "config": {"mediaType": EMPTY, "digest": digest_of(empty), "size": len(empty)},
                "layers": layers,
            }
            self.digest = self.registry.put_manifest(self.repository, self._tag, canonical_json(manifest))

    def _listed(self, raw: bytes) -> dict[str, Mapping[str, Any]]:
        where = f"oci://{self.registry.host}/{self.repository}:{self._tag}"
        try:
            document = read_json(raw, _DOCUMENT)
            if document.get("artifactType") != KIND:
                raise PublishError(f"{where} is not a release: it is of {document.get('artifactType')!r}")
            found = {layer["annotations"][_TITLE]: layer for layer in document["layers"]}
            if all(type(each["size"]) is int and isinstance(each["digest"], str) for each in found.values()):
                return found
        except (DocumentError, KeyError, TypeError) as error:
            raise PublishError(f"{where} holds something that is not a release") from error
        raise PublishError(f"{where} holds something that is not a release")


class WeightsPlace:
    """A release's weights in a container registry, as an artifact or as a volume (`containers.image.weights`)."""

    def __init__(self, registry: Registry, repository: str, digest: str) -> None:
        self.registry, self.repository, self.digest = registry, repository, digest
        self._artifact = OciArtifact(registry.host, repository, None, digest)
        self._files = {file.path.removeprefix("model/"): file for file in self._artifact.find().files}

    def names(self) -> list[str]:
        """List the files of the release."""
        return sorted(self._files)

    def open(self, name: str, start: int = 0) -> Any:  # noqa: ANN401 - as `Place` has it
        """Read a file from a byte on."""
        return self._artifact.open(None, self._files[name], start)

    def write(self, _files: Mapping[str, Path], _progress: Progress) -> None:
        """Refuse: what `slipway release` pushed stays as it is."""
        raise PublishError(f"oci://{self.registry.host}/{self.repository}@{self.digest} is not a place to publish to")


def _oci_place(registry: Registry, repository: str, tag: str, digest: str | None) -> OciPlace | WeightsPlace:
    found = registry.manifest(repository, digest or tag)
    if found is None and digest is not None:
        raise PublishError(f"{registry.host}/{repository} has no {digest}")
    if found is None:
        return OciPlace(registry, repository, tag, None)
    try:
        notes = read_json(found[0], _DOCUMENT).get("annotations") or {}
    except (DocumentError, AttributeError):
        notes = {}
    if RELEASE_DIGEST in notes:
        return WeightsPlace(registry, repository, digest_of(found[0]))
    return OciPlace(registry, repository, tag, found[0])


def _counter(files: Mapping[str, Path], progress: Progress) -> Counter:
    return Counter(progress, "uploading", sum(path.stat().st_size for path in files.values()) / 1e6, "MB")


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk
