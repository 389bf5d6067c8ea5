"""Files that change under the gateway."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from containers.gateway.config import Watched
from containers.gateway.errors import ConfigurationError


def parsed(data: bytes) -> bytes:
    return data


def test_content_and_digest_are_of_one_reading(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_bytes(b"first")
    following = [b"second", b"third"]

    def replaced_meanwhile(data: bytes) -> bytes:
        if following:
            file.write_bytes(following.pop(0) * 2)
        return data

    watched = Watched(file, replaced_meanwhile)
    for _ in range(3):
        assert watched.digest == f"sha256:{hashlib.sha256(watched.value).hexdigest()}"
        watched.refresh()
    assert watched.value == b"thirdthird"


def test_a_file_that_cannot_be_read_for_a_moment_is_read_at_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys.json"
    file.write_bytes(b"first")
    watched = Watched(file, parsed)
    file.write_bytes(b"second, without the revoked key")

    def no_descriptor_left(_: Path) -> bytes:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", no_descriptor_left)
        assert not watched.refresh()
        assert watched.value == b"first"
        assert watched.error is not None
    assert watched.refresh()
    assert watched.value == b"second, without the revoked key"
    assert not watched.error


def test_a_file_that_is_gone_is_an_error_until_it_is_back(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_bytes(b"first")
    watched = Watched(file, parsed)
    beside = file.rename(tmp_path / "away")
    assert [watched.refresh(), watched.refresh(), watched.error is not None] == [False, False, True]
    beside.rename(file)
    assert watched.refresh()
    assert watched.error is None
    with pytest.raises(ConfigurationError, match="can't read"):
        Watched(tmp_path / "none", parsed)
