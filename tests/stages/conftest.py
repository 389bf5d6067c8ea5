"""What stage tests of several modules use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from real_server import AWS, BUCKET, s3_server

from pipeline.compatibility.scheme import Scheme
from pipeline.settings import Settings
from registry.objects import ObjectStore
from shared import made_once
from stages.demo_checkpoints import Checkpoint, make_checkpoint, read_checkpoint


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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, machine: Settings) -> Callable[..., Checkpoint]:
    """Quantizes the demo model by a scheme, once for all tests; what it gives is only read."""

    def quantized(scheme: Mapping[str, Any]) -> Checkpoint:
        canonical = json.dumps(Scheme.model_validate(scheme).model_dump(mode="json"), sort_keys=True)
        name = f"checkpoint-{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"
        folder = made_once(tmp_path_factory, name, lambda folder: make_checkpoint(folder, scheme, machine))
        return read_checkpoint(folder)

    return quantized
