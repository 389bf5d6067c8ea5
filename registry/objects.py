"""Files in object storage, named by their content: stored and fetched whole, with their digest, or not at all.

An object is `PREFIX/sha256/HEX`: what is there under a name is its content or damaged, and two that have the same share
it. Releases that nobody uses (`registry.tiers`) and what goes to a worker elsewhere and back are kept so. A note is a
text under a name of its own, `PREFIX/NAME`, and says what contents are for.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from registry.digests import digest_file
from registry.download import CHUNK, Reader
from registry.errors import TrackingError
from registry.manifest import FileRecord

_STORE = re.compile(r"s3://(?P<bucket>[^/]+)/?(?P<prefix>.*)")


@dataclass(frozen=True)
class ObjectStore:
    """Files under ``s3://BUCKET/PREFIX``; where that is and as whom, boto3 reads from its own settings (``AWS_…``)."""

    uri: str
    client: Any

    @classmethod
    def opened(cls, uri: str) -> ObjectStore:
        """Open the store at ``s3://BUCKET/PREFIX``.

        Raises:
            TrackingError: The URI is not of that form, or boto3 is not installed.
        """
        if _STORE.fullmatch(uri) is None:
            raise TrackingError(f"`{uri}` is not an object store: expected s3://BUCKET/PREFIX")
        try:
            import boto3  # noqa: PLC0415 - for those who have S3
        except ImportError as error:
            raise TrackingError("files are in S3: install boto3") from error
        return cls(uri, boto3.client("s3"))

    def place(self, sha256: str) -> tuple[str, str]:
        """The bucket and the key of a content."""
        return self._place(f"sha256/{sha256}")

    def note(self, name: str, text: str) -> None:
        """Write a note, or replace it.

        Raises:
            TrackingError: The store refuses.
        """
        bucket, key = self._place(name)
        self._asked(lambda: self.client.put_object(Bucket=bucket, Key=key, Body=text.encode()))

    def noted(self, name: str) -> str | None:
        """Return the note under a name; None if there is none.

        Raises:
            TrackingError: The store can't be reached.
        """
        bucket, key = self._place(name)
        text: str | None = self._asked(lambda: self._text(bucket, key))
        return text

    def has(self, record: FileRecord) -> bool:
        """Whether an object of this name and size exists; its content is checked when it is fetched.

        Raises:
            TrackingError: the store can't be reached.
        """
        bucket, key = self.place(record.sha256)
        size: int | None = self._asked(lambda: self._size(bucket, key))
        return size == record.size

    def put(self, path: Path, record: FileRecord, *, anew: bool = False) -> None:
        """Store a file, and read it back; what is there already is read back alone, or replaced ``anew``.

        Raises:
            TrackingError: the store refuses, or holds something else.
        """
        bucket, key = self.place(record.sha256)
        if anew or not self.has(record):
            self._asked(lambda: self.client.upload_file(str(path), bucket, key))
        if self._digest(bucket, key) != record.sha256:
            raise TrackingError(
                f"s3://{bucket}/{key} differs from the file that was uploaded: nothing was removed here"
            )

    def get(self, record: FileRecord, target: Path) -> None:
        """Fetch a file to ``target``, which is complete and has its digest, or is not there.

        Raises:
            TrackingError: The store can't be reached, or what it holds is damaged.
        """
        bucket, key = self.place(record.sha256)
        part = target.with_name(target.name + ".part")
        try:
            self._asked(lambda: self.client.download_file(bucket, key, str(part)))
            if digest_local(part) != record.sha256:
                raise TrackingError(f"s3://{bucket}/{key} does not have the SHA-256 in its name: it is damaged")
            with part.open("rb") as stream:
                os.fsync(stream.fileno())
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def open(self, sha256: str, start: int) -> AbstractContextManager[tuple[Reader, int]]:
        """Read a content from a byte on, as `registry.download.Open` has it."""
        from registry.s3 import S3Artifacts  # noqa: PLC0415 - boto3, for those who have S3

        bucket, key = self.place(sha256)
        root, _, name = key.rpartition("/")
        return S3Artifacts(self.client, bucket, root).open(name, start)

    def _place(self, name: str) -> tuple[str, str]:
        match = _STORE.fullmatch(self.uri)
        prefix = match["prefix"].strip("/") if match else ""
        return urlsplit(self.uri).netloc, "/".join(filter(None, [prefix, name]))

    def _size(self, bucket: str, key: str) -> int | None:
        from botocore.exceptions import ClientError  # noqa: PLC0415 - with boto3

        try:
            return int(self.client.head_object(Bucket=bucket, Key=key)["ContentLength"])
        except ClientError:
            return None

    def _text(self, bucket: str, key: str) -> str | None:
        try:
            return str(self.client.get_object(Bucket=bucket, Key=key)["Body"].read().decode(errors="replace"))
        except self.client.exceptions.NoSuchKey:
            return None

    def _digest(self, bucket: str, key: str) -> str:
        total = hashlib.sha256()
        body = self._asked(lambda: self.client.get_object(Bucket=bucket, Key=key)["Body"])
        for chunk in body.iter_chunks(CHUNK):
            total.update(chunk)
        return total.hexdigest()

    def _asked(self, act: Callable[[], Any]) -> Any:  # noqa: ANN401 - what boto3 gives
        from boto3.exceptions import Boto3Error  # noqa: PLC0415 - with boto3
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415

        try:
            return act()
        except (Boto3Error, BotoCoreError, ClientError) as error:
            raise TrackingError(f"{self.uri}: {error}") from error


def digest_local(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hex digits.

    Raises:
        TrackingError: It can't be read.
    """
    try:
        return digest_file(path)
    except OSError as error:
        raise TrackingError(f"`{path}` can't be read: {error.strerror}") from error
