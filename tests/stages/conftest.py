"""What stage tests of several modules use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from real_server import AWS, BUCKET, s3_server

from registry.objects import ObjectStore


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3-compatible storage."""
    with s3_server(tmp_path_factory.mktemp("cloud")) as address:
        yield address


@pytest.fixture
def store(cloud: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ObjectStore:
    """An object store of the test's own in it; the environment says where it is and as whom."""
    for name, value in {**AWS, "AWS_ENDPOINT_URL": cloud}.items():
        monkeypatch.setenv(name, value)
    return ObjectStore.opened(f"s3://{BUCKET}/{tmp_path.name}")
