"""What a base by digest lacks, from its distribution's archive: fetched with network once, installed without it.

The archive is asked for its state at the profile's snapshot, so the same packages come on any day; what came is kept
with its digests under ``$SLIPWAY_HOME/packages``, and the installation's result is taken out as a layer of ours.
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
from containers.image.layers import CHUNK, Stream, archive, plain_files
from containers.image.profile import RuntimeProfile
from registry.progress import Progress

# Raised when the same packages become another layer.
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
# What an installation leaves that is no part of a package, and differs from run to run.
_LEFTOVERS = (
    "debs", "tmp", "run", "proc", "sys", "dev", "root", ".dockerenv", "etc/hostname", "etc/hosts",
    "etc/resolv.conf", "etc/mtab", "var/log", "var/cache", "var/lib/apt", "var/lib/dpkg/status-old",
    "var/lib/dpkg/lock", "var/lib/dpkg/lock-frontend",
)  # fmt: skip


def fetch(client: docker.DockerClient, profile: RuntimeProfile, base: str, home: Path, progress: Progress) -> Path:
    """Return the folder with the profile's packages; one that is there is checked, not fetched again.

    Raises:
        ImageError: the archive can't be reached or lacks a package; the message holds apt's last words.
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
    """Write down the digests of the packages in ``folder``, as ``packages.json``; return them by name."""
    digests = _digests(folder)
    if not digests:
        raise ImageError(f"{folder} holds no packages")
    (folder / "packages.json").write_text(json.dumps(digests, indent=1, sort_keys=True))
    return digests


def check(folder: Path) -> None:
    """Compare every package in ``folder`` with what was fetched.

    Raises:
        ImageError: naming every one that is extra, missing or different.
    """
    try:
        recorded: dict[str, str] = json.loads((folder / "packages.json").read_text())
    except (OSError, ValueError) as error:
        raise ImageError(f"{folder} is not a folder of fetched packages: remove it to fetch them again") from error
    found = _digests(folder)
    wrong = sorted(name for name in found.keys() | recorded.keys() if found.get(name) != recorded.get(name))
    if wrong:
        raise ImageError(f"packages are not those that were fetched: {', '.join(f'`{name}`' for name in wrong)}; "
                         f"remove {folder}")  # fmt: skip


def installed(
    client: docker.DockerClient, profile: RuntimeProfile, base: str, folder: Path, home: Path, progress: Progress
) -> Iterator[bytes]:
    """Install the packages in ``folder`` on ``base`` without network; stream what changed as a layer of ours.

    Raises:
        ImageError: dpkg refuses them; the message holds its last words.
    """
    check(folder)
    files = archive([member for member in plain_files(folder, "debs") if member.name.endswith(".deb")])
    command = ["/bin/sh", "-c", _INSTALL]
    what = f"the packages of {profile.name}"
    with ran(client, base, command, what=what, home=home, progress=progress, files=files) as box:
        yield from changed(box, what=what, skip=_LEFTOVERS)


def _files(layer: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """The plain files of a layer, by their last names."""
    with tarfile.open(fileobj=BufferedReader(Stream(layer), CHUNK), mode="r|") as source:
        for member in source:
            file = source.extractfile(member) if member.isreg() else None
            if file is not None:
                yield PurePosixPath(member.name).name, file.read()


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.deb"))}
