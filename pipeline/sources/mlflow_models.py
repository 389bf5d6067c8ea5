"""Models that MLflow keeps: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` and ``runs:/RUN/PATH``.

An alias is resolved to the version that it names now. Of a model in MLflow's transformers flavour the files of the
model and of its tokenizer are taken, otherwise those at the top of the artifact. MLflow states no digests: the lock
records them when a version is first pulled. The tracking server, and as whom it is asked, are Slipway's settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from urllib.parse import unquote, urlsplit

from pipeline.errors import SourceError
from pipeline.sources.folder import Folder
from pipeline.sources.objects import changed
from pipeline.sources.origin import Access, Found, Origin, SourceFile, open_origin
from registry import catalog
from registry.download import Reader
from registry.tracking import connected, local_folder, shown

_NAME = r"[^/@:%\x00-\x1f\x7f]{1,256}"
_MODEL = re.compile(rf"models:/(?P<name>{_NAME})(?:@(?P<alias>[\w-]{{1,255}})|/(?P<number>[1-9]\d{{0,9}}))")
_RUN = re.compile(r"runs:/(?P<run>[0-9a-f]{32})/(?P<path>[^\x00-\x1f\x7f]{1,500})")
# Where the transformers flavour keeps the weights, and the tokenizer.
_FLAVOUR = ("model", "components/tokenizer")
_CLOUDS = ("s3", "gs", "az")


@dataclass(frozen=True)
class ServedFolder:
    """A folder of the artifacts that an MLflow server hands out, as an `Origin`."""

    tracking_uri: str
    root: str
    pinned: None = None

    @property
    def uri(self) -> str:
        """The address within the server's store."""
        return f"mlflow-artifacts:/{self.root}"

    def find(self) -> Found:
        """List the files at its top level, and make sure that the list is still the same."""
        from registry.server import MlflowServer  # noqa: PLC0415 - for those who have a server

        with MlflowServer(self.tracking_uri) as server:
            listed = server.list_proxied(self.root)
            if server.list_proxied(self.root) != listed:
                raise changed(self.uri, "its list of files changed while it was read")
        return Found(None, tuple(SourceFile(each["path"], each["size"]) for each in listed if not each["is_dir"]))

    @contextmanager
    def open(
        self, _revision: str | None, file: SourceFile, start: int, _stop: int | None = None
    ) -> Iterator[tuple[Reader, int]]:
        """Open a file, in the store behind the server where it says where that is, else through the server."""
        from registry.server import MlflowServer  # noqa: PLC0415 - for those who have a server
        from registry.version_files import ServerArtifacts  # noqa: PLC0415 - the same

        with (
            MlflowServer(self.tracking_uri) as server,
            ServerArtifacts(server, self.root).open(file.path, start) as opened,
        ):
            yield opened


@dataclass(frozen=True)
class MlflowModel:
    """A registered version, or the artifacts of a run, as an `Origin`.

    A file's ``version`` is ``NUMBER|FOLDER|VERSION``: the number of the model's version (empty for a run), the folder
    of its artifacts that holds the file, and the version in the object storage, where the artifacts are in one.
    """

    uri: str
    access: Access
    pinned: None = None

    def find(self) -> Found:
        """List the files of the version that is named now."""
        number = self._number
        root = self._listed(number, "")
        names = {file.path for file in root}
        if "config.json" in names or "MLmodel" not in names:
            return Found(None, root)
        return Found(None, tuple(file for folder in _FLAVOUR for file in self._listed(number, folder)))

    @contextmanager
    def open(
        self, revision: str | None, file: SourceFile, start: int, stop: int | None = None
    ) -> Iterator[tuple[Reader, int]]:
        """Open a file of the version that was listed or locked."""
        number, _, rest = (file.version or "").partition("|")
        folder, _, version = rest.partition("|")
        if folder not in {"", *_FLAVOUR} or not (number.isdecimal() or not number):
            raise SourceError(f"{self.uri}: the lock has an invalid version of {file.path}: delete it")
        origin = self._folder(number, folder)
        with origin.open(revision, replace(file, version=version or None), start, stop) as opened:
            yield opened

    def _listed(self, number: str, folder: str) -> tuple[SourceFile, ...]:
        found = self._folder(number, folder).find().files
        return tuple(replace(file, version=f"{number}|{folder}|{file.version or ''}") for file in found)

    def _folder(self, number: str, folder: str) -> Origin:
        """Open a folder of the artifacts where they are stored."""
        location = f"{self._location(number).rstrip('/')}/{folder}".rstrip("/")
        parts, tracking = urlsplit(location), urlsplit(self.access.tracking_uri)
        served = tracking.scheme in ("http", "https")
        if served and parts.scheme == "mlflow-artifacts" and ".." not in unquote(parts.path).split("/"):
            return ServedFolder(self.access.tracking_uri, unquote(parts.path).strip("/"))
        if parts.scheme in _CLOUDS:
            return open_origin(location, None, self.access)
        place = local_folder(location)
        if place is not None and not served:
            return Folder(f"file:{place}")
        raise SourceError(
            f"{self.uri}: MLflow at {shown(self.access.tracking_uri)} keeps these files at {shown(location)[:200]!r}, "
            "which is not read: expected files that the server hands out, or in S3, Google Cloud Storage or Azure"
        )

    @cached_property
    def _number(self) -> str:
        """The number of the version that the URI names now; empty for a run."""
        match = _MODEL.fullmatch(self.uri)
        if match is None:
            return ""
        if match["number"]:
            return match["number"]
        line = catalog.line(self.access.tracking_uri, match["name"])
        if line is None:
            raise SourceError(f"MLflow at {self._where} has no registered model `{match['name']}`")
        if match["alias"] not in line.aliases:
            known = ", ".join(f"`{each}`" for each in sorted(line.aliases)) or "none"
            raise SourceError(
                f"`{match['name']}` in MLflow at {self._where} has no alias `{match['alias']}`: it has {known}"
            )
        return line.aliases[match["alias"]]

    def _location(self, number: str) -> str:
        match = _MODEL.fullmatch(self.uri)
        if match is None:
            return self._of_run()
        found = catalog.version(self.access.tracking_uri, match["name"], number)
        if found is None:
            raise SourceError(f"`{match['name']}` in MLflow at {self._where} has no version {number}")
        return found.location

    def _of_run(self) -> str:
        """Where a run keeps the artifact: among its own files or, since MLflow 3, as a model that it has logged."""
        match = _RUN.fullmatch(self.uri)
        if match is None:
            raise AssertionError("unreachable: the URI was checked when it was opened")
        with connected(self.access.tracking_uri) as client:
            run = client.get_run(match["run"])
            outputs = run.outputs.model_outputs if run.outputs else ()
            logged = [client.get_logged_model(each.model_id) for each in outputs[:100]]
            found = [str(each.artifact_location) for each in logged if each.name == match["path"]]
            return found[-1] if found else f"{str(run.info.artifact_uri).rstrip('/')}/{match['path']}"

    @property
    def _where(self) -> str:
        return shown(self.access.tracking_uri)


def open_artifacts(uri: str, revision: str | None, access: Access) -> MlflowModel:
    """Open ``models:/…`` or ``runs:/…``."""
    if not (_MODEL.fullmatch(uri) or _RUN.fullmatch(uri)) or ".." in uri.split("/"):
        raise SourceError(
            f"can't pull from `{uri}`: expected models:/NAME@ALIAS, models:/NAME/VERSION or runs:/RUN/PATH"
        )
    if revision is not None:
        raise SourceError(f"`revision` does not apply to {uri}: name the alias or the version in the URI; remove it")
    return MlflowModel(uri, access)
