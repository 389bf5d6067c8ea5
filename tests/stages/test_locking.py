"""Making a lock for real: requirements from the package index, a tag from a registry; and what happens without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from containers.errors import ProfileError
from containers.image import profile
from containers.image.distribution import DistributionError, Registry
from containers.image.locking import lock
from containers.image.oci import OciImage
from pipeline.settings import Settings
from stages.loopback_registry import serving

PROFILE = {
    "python": "python3.11", "platform": "x86_64-manylinux_2_36", "lock": "small.txt", "torch": "2.13.0",
    "entrypoint": ["/bin/serve"], "user": 65534,
}  # fmt: skip


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A registry on loopback."""
    with serving(tmp_path / "registry") as served:
        yield served


def write(folder: Path, base: dict[str, object], requirements: str) -> profile.RuntimeProfile:
    (folder / "small.yaml").write_text(yaml.safe_dump({**PROFILE, "base": base}))
    (folder / "small.in").write_text(requirements)
    return profile.stated("small", folder)


def tagged(address: str, label: str) -> str:
    """Put an image under the tag ``1``; give its digest."""
    image = OciImage({"Labels": {"x": label}}, (), (), {})
    with Registry(address) as registry:
        registry.put_blob("base", image.config)
        return registry.put_manifest("base", "1", image.manifest)


def test_a_lock_resolves_tag_and_requirements_and_shows_what_changed(
    address: str, machine: Settings, tmp_path: Path
) -> None:
    variables = machine.installer_environment
    digest = tagged(address, "one")
    stated = write(tmp_path, {"image": f"{address}/base:1"}, "idna==3.6\n")
    first = lock(stated, print, variables=variables)
    assert first.changes == (f"base: none → {address}/base:1@{digest}", "idna: none → 3.6")
    loaded = profile.load("small", tmp_path)
    assert loaded.base.image == f"{address}/base:1@{digest}"
    assert lock(stated, print, variables=variables).changes == ()
    moved = tagged(address, "two")
    stated = write(tmp_path, {"image": f"{address}/base:1"}, "idna==3.7\n")
    with pytest.raises(ProfileError, match="since `requirements` changed: run `slipway lock small`"):
        profile.load("small", tmp_path)
    second = lock(stated, print, variables=variables)
    assert second.changes == (
        f"base: {address}/base:1@{digest} → {address}/base:1@{moved}", "idna: 3.6 → 3.7",
    )  # fmt: skip
    assert "https://" not in (tmp_path / "small.txt").read_text()


def test_a_base_whose_registry_is_away_keeps_its_digest_and_a_new_tag_is_refused(
    machine: Settings, tmp_path: Path
) -> None:
    with serving(tmp_path / "registry") as address:
        digest = tagged(address, "one")
        stated = write(tmp_path, {"image": f"{address}/base:1"}, "idna==3.6\n")
        lock(stated, print, variables=machine.installer_environment)
    said: list[str] = []
    lock(stated, said.append, variables=machine.installer_environment)
    assert profile.load("small", tmp_path).base.image == f"{address}/base:1@{digest}"
    assert any("keeping the locked digest of" in line for line in said)
    other = write(tmp_path, {"image": f"{address}/base:2"}, "idna==3.6\n")
    with pytest.raises(DistributionError, match="can't be reached"):
        lock(other, print, variables=machine.installer_environment)


def test_requirements_that_contradict_each_other_are_an_error_and_the_lock_stays(
    machine: Settings, tmp_path: Path
) -> None:
    base: dict[str, object] = {"debian": {"suite": "bookworm", "packages": ["python3"]}}
    lock(write(tmp_path, base, "idna==3.6\n"), print, variables=machine.installer_environment)
    before = (tmp_path / "small.txt").read_bytes(), (tmp_path / "small.lock.json").read_bytes()
    wrong = write(tmp_path, base, "idna==3.6\nidna==3.7\n")
    with pytest.raises(ProfileError, match="the requirements of small can't be resolved"):
        lock(wrong, print, variables=machine.installer_environment)
    assert ((tmp_path / "small.txt").read_bytes(), (tmp_path / "small.lock.json").read_bytes()) == before
