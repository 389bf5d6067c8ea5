"""Debian packages to add to a base: downloaded once, installed without network.

They come from the archive's snapshot named in the profile, so they are the same on any day. They are stored with their
digests under ``$SLIPWAY_HOME/packages``. The result of the installation is exported as a normalized layer.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path, PurePosixPath

import docker

from containers.errors import ImageError
from containers.image.assembly import changed, ran, taken
from containers.image.downloaded import differences, digests, write_record
from containers.image.layers import CHUNK, Stream, archive, plain_files
from containers.image.profile import RuntimeProfile
from registry.progress import Progress

# Increase it when the same packages give another layer.
VERSION = 1
_FETCH = """
set -eu
rm -f /etc/apt/sources.list.d/cuda*
mkdir -p /debs/partial
apt-get update -q --snapshot {snapshot}
apt-get install -q -y --no-install-recommends --download-only -o Dir::Cache::Archives=/debs \\
  --snapshot {snapshot} {names}
rm -rf /debs/partial /debs/lock
"""
_INSTALL = (
    "DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends --no-download "
    "-o Dpkg::Use-Pty=0 /debs/*.deb"
)
# Files left by an installation that do not belong to a package and differ from run to run.
_LEFTOVERS = (
    "debs", "tmp", "run", "proc", "sys", "dev", "root", ".dockerenv", "etc/hostname", "etc/hosts",
    "etc/resolv.conf", "etc/mtab", "var/log", "var/cache", "var/lib/apt", "var/lib/dpkg/status-old",
    "var/lib/dpkg/lock", "var/lib/dpkg/lock-frontend",
)  # fmt: skip


def fetch(client: docker.DockerClient, profile: RuntimeProfile, base: str, home: Path, progress: Progress) -> Path:
    """Return the folder with the profile's packages, downloaded unless it exists; its digests are checked.

    Raises:
        ImageError: the archive can't be reached or lacks a package; the message has apt's last output.
    """
    key = json.dumps([base, profile.base.packages, profile.base.snapshot])
    folder = home / "packages" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if folder.is_dir():
        check(folder)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    names = " ".join(profile.base.packages)
    progress(f"fetching {names} as of {profile.base.snapshot}")
    script = _FETCH.format(snapshot=profile.base.snapshot, names=names)
    what = f"the packages of {profile.name}"
    with (
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as scratch,
        ran(client, base, ["/bin/sh", "-c", script], what=what, home=home, progress=progress, network="host") as box,
    ):
        beside = Path(scratch) / "debs"
        beside.mkdir()
        for name, content in _files(taken(box, "/debs", what=what)):
            (beside / name).write_bytes(content)
        record(beside)
        beside.rename(folder)
    return folder


def record(folder: Path) -> dict[str, str]:
    """Write the digests of the packages in ``folder`` to ``packages.json``; return them by name."""
    found = digests(folder, folder.glob("*.deb"))
    if not found:
        raise ImageError(f"{folder} contains no packages")
    write_record(folder / "packages.json", found)
    return found


def check(folder: Path) -> None:
    """Compare the packages in ``folder`` with the recorded digests.

    Raises:
        ImageError: the message names each extra, missing or different one.
    """
    wrong = differences(folder / "packages.json", digests(folder, folder.glob("*.deb")))
    if wrong:
        raise ImageError(
            f"packages differ from those downloaded: {'; '.join(wrong)}; remove {folder} to download them again"
        )


def installed(
    client: docker.DockerClient, profile: RuntimeProfile, base: str, folder: Path, home: Path, progress: Progress
) -> Iterator[bytes]:
    """Install the packages in ``folder`` on ``base`` without network; stream the changes as a normalized layer.

    Raises:
        ImageError: dpkg failed; the message has its last output.
    """
    check(folder)
    files = archive([member for member in plain_files(folder, "debs") if member.name.endswith(".deb")])
    command = ["/bin/sh", "-c", _INSTALL]
    what = f"the packages of {profile.name}"
    with ran(client, base, command, what=what, home=home, progress=progress, files=files) as box:
        yield from changed(box, what=what, skip=_LEFTOVERS)


def _files(layer: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """The plain files of a layer, by base name."""
    with tarfile.open(fileobj=BufferedReader(Stream(layer), CHUNK), mode="r|") as source:
        for member in source:
            file = source.extractfile(member) if member.isreg() else None
            if file is not None:
                yield PurePosixPath(member.name).name, file.read()
