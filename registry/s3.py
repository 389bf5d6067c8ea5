"""Files in S3, or in what speaks its language: listed by boto3, read by presigned address like any other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, Self

from registry.download import Reader
from registry.errors import TrackingError
from registry.stream import stream

_ADDRESS_SECONDS = 3600
# As `registry.version_files` has it.
_MOST_ENTRIES = 20_000


class S3Artifacts:
    """Files under ``root`` in a bucket; where and as whom, boto3 reads from its own settings (``AWS_…``)."""

    def __init__(self, client: Any, bucket: str, root: str) -> None:  # noqa: ANN401 - boto3 makes its types at run time
        self._client, self._bucket, self._root = client, bucket, root

    @classmethod
    @contextmanager
    def opened(cls, bucket: str, root: str) -> Iterator[Self]:
        """Open the bucket during the block.

        Raises:
            TrackingError: boto3 is not installed, or S3 refuses a request.
        """
        try:
            import boto3  # noqa: PLC0415 - for those who have S3
            from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415
        except ImportError as error:
            raise TrackingError("the files are in S3: install `slipway-registry[s3]`, which brings boto3") from error
        try:
            stored = cls(boto3.client("s3"), bucket, root)
            yield stored
        except (BotoCoreError, ClientError) as error:
            raise TrackingError(f"s3://{bucket}/{root}: {error}") from error

    @property
    def client(self) -> Any:  # noqa: ANN401 - as above
        """The client of boto3."""
        return self._client

    def names(self) -> list[str]:
        """Return the names of all files, sorted.

        Raises:
            TrackingError: There are more than a release has.
        """
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=f"{self._root}/")
        keys = [item["Key"] for item in islice(_contents(pages), _MOST_ENTRIES + 1)]
        if len(keys) > _MOST_ENTRIES:
            raise TrackingError(f"s3://{self._bucket}/{self._root} has more than {_MOST_ENTRIES} files: no release has")
        return sorted(key.removeprefix(f"{self._root}/") for key in keys if not key.endswith("/"))

    @contextmanager
    def open(self, name: str, start: int = 0) -> Iterator[tuple[Reader, int]]:
        """Read the object from a byte on."""
        where = {"Bucket": self._bucket, "Key": f"{self._root}/{name}"}
        address = self._client.generate_presigned_url("get_object", Params=where, ExpiresIn=_ADDRESS_SECONDS)
        with stream(address, {}, start, "AWS_CA_BUNDLE") as opened:
            yield opened


def _contents(pages: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for page in pages:
        yield from page.get("Contents", ())
