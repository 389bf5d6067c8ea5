"""Models in S3, or in what speaks its language: ``s3://BUCKET/PREFIX``.

boto3 lists the objects, with credentials and address of its own standard variables and files (``AWS_…``, ``~/.aws``);
objects are read from presigned addresses under the policy of `registry.network`. An object is held to the version ID
that it had when it was listed or, in a bucket without versions, to its ETag.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from pipeline.errors import SourceError, UnreachableError
from pipeline.sources import objects
from pipeline.sources.origin import Access, Found, SourceFile
from registry.download import Reader
from registry.errors import RefusedError
from registry.stream import stream

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

_ADDRESS_SECONDS = 12 * 3600
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired")
_ABSENT = ("NoSuchKey", "NoSuchVersion", "NoSuchBucket", "404")


@dataclass(frozen=True)
class Prefix:
    """The objects under a prefix of a bucket, as an `Origin`; those in deeper folders are not part of the model."""

    client: Any
    bucket: str
    prefix: str
    pinned: None = None

    @property
    def uri(self) -> str:
        """Where they are."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def find(self) -> Found:
        """List the objects with their versions; ``SourceError`` if the list changes meanwhile."""
        with self._explained():
            return objects.find(self.uri, self._listed, self._file)

    @contextmanager
    def open(
        self, _revision: str | None, file: SourceFile, start: int, stop: int | None = None
    ) -> Iterator[tuple[Reader, int]]:
        """Read the version of an object that was listed."""
        version = _version(file)
        wanted = {**self._where(file.path), **({"VersionId": version["VersionId"]} if "VersionId" in version else {})}
        headers = {"If-Match": version["ETag"]} if "ETag" in version else {}
        with self._explained():
            address = self.client.generate_presigned_url("get_object", Params=wanted, ExpiresIn=_ADDRESS_SECONDS)
        try:
            with stream(address, headers, start, "AWS_CA_BUNDLE", stop=stop) as opened:
                yield opened
        except RefusedError:
            with self._explained(file.path):  # S3 gives boto3 the reason
                held = {"IfMatch": version["ETag"]} if "ETag" in version else {}
                self.client.get_object(**wanted, **held)["Body"].close()
            raise

    def _where(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": f"{self.prefix}/{name}".lstrip("/")}

    def _listed(self) -> dict[str, tuple[int, str]]:
        """Size and ETag of the objects at the top level, by name."""
        start = f"{self.prefix}/" if self.prefix else ""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start, Delimiter="/")
        found = islice((each for page in pages for each in page.get("Contents", ())), objects.MOST_OBJECTS + 2)
        named = {str(each["Key"]).removeprefix(start): each for each in found}
        return {name: (int(each["Size"]), str(each["ETag"])) for name, each in named.items() if name}

    def _file(self, name: str, entry: tuple[int, str]) -> SourceFile:
        size, etag = entry
        told = self.client.head_object(**self._where(name))
        if (told["ContentLength"], told["ETag"]) != (size, etag):
            raise objects.changed(self.uri, f"{name} changed while the objects were listed")
        version = told.get("VersionId", "null")
        return SourceFile(name, size, version=f"etag:{etag}" if version == "null" else f"version:{version}")

    @contextmanager
    def _explained(self, name: str = "") -> Iterator[None]:
        """Turn an error of boto3 into one line; its messages hold no credentials."""
        from botocore.exceptions import (  # noqa: PLC0415 - slow to import  # noqa: PLC0415 - the same
            BotoCoreError,
            ClientError,
            HTTPClientError,
            NoCredentialsError,
            PartialCredentialsError,
        )

        try:
            yield
        except ClientError as error:
            raise self._refusal(error, name) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise SourceError(
                f"{self.uri} can't be read without credentials: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY"
            ) from error
        except HTTPClientError as error:
            raise UnreachableError(f"{self.uri} can't be reached: {_line(error)}; run again") from error
        except (BotoCoreError, ValueError) as error:  # a setting that boto3 does not take
            raise SourceError(f"{self.uri} can't be read: {_line(error)}") from error

    def _refusal(self, error: ClientError, name: str) -> SourceError:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        what = f"{self.uri}/{name}".rstrip("/")
        if code in _EXPIRED:
            return SourceError(f"{what}: the AWS credentials have expired: renew them and run again")
        if status == 412:
            return objects.overwritten(what)
        if code in _ABSENT or status == 404:
            return SourceError(f"{what} does not exist")
        kind = UnreachableError if status == 429 or status >= 500 else SourceError
        return kind(f"{what}: S3 refused with {code or 'status'} ({status}): {_line(error)}")


def _version(file: SourceFile) -> Mapping[str, str]:
    kind, _, value = (file.version or "").partition(":")
    return {"version": {"VersionId": value}, "etag": {"ETag": value}}.get(kind, {}) if value else {}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def open_prefix(uri: str, revision: str | None, _access: Access) -> Prefix:
    """Open ``s3://BUCKET/PREFIX``."""
    placed = Prefix(None, *objects.split(uri, revision))
    import boto3  # noqa: PLC0415 - it takes a fifth of a second
    from botocore.config import Config  # noqa: PLC0415 - the same

    with placed._explained():  # noqa: SLF001 - of this module
        client = boto3.Session().client("s3", config=Config(signature_version="s3v4", retries={"mode": "standard"}))
    return Prefix(client, placed.bucket, placed.prefix)
