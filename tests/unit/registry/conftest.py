from __future__ import annotations

from pathlib import Path

import pytest
from release_folder import make_release

from registry.signing import SigningKey, load_or_create_key


@pytest.fixture(scope="session")
def signing_key(tmp_path_factory: pytest.TempPathFactory) -> SigningKey:
    return load_or_create_key(tmp_path_factory.mktemp("keys") / "release.pem")


@pytest.fixture
def release(tmp_path: Path, signing_key: SigningKey) -> Path:
    """A sealed release folder."""
    folder = tmp_path / "release"
    make_release(folder, signing_key)
    return folder
