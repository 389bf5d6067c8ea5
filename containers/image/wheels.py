"""The wheels of a runtime: downloaded once to ``$SLIPWAY_HOME/wheels``, each checked against the lock."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from containers.errors import WheelError
from containers.image.downloaded import differences, digests, write_record
from containers.image.profile import RUNTIMES, RuntimeProfile, normalized, read_lock
from registry.counting import Counter
from registry.progress import Progress

_FETCHING = re.compile(
    r"(?P<what>Downloading|Using cached|Processing|Saved) \S+\.whl(?:#\S*)?"
    r"(?: \((?P<size>[\d.]+) (?P<unit>[kMG]?B)\))?$"
)
_MEGABYTES = {"B": 1e-6, "kB": 1e-3, "MB": 1.0, "GB": 1e3}
_RECORD = "wheels.json"
INSTALLER_LOCK = RUNTIMES / "installer.txt"


def fetch_wheels(profile: RuntimeProfile, cache: Path, progress: Progress) -> Path:
    """Return a folder with exactly the profile's wheels, and with their installer in ``installer/``.

    Its name in ``cache`` is the digest of the request. It is made atomically, and its ``wheels.json`` has the sha256 of
    each file. An existing folder is checked, not downloaded again.

    Raises:
        WheelError: a wheel can't be downloaded, or does not match the lock; the message names it.
    """
    folder = cache / _key(profile)
    if folder.is_dir():
        check_wheels(profile, folder)
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as name:
        beside = Path(name) / "wheels"
        (beside / "installer").mkdir(parents=True)
        count = len(read_lock(profile.lock_path))
        progress(f"downloading {count} wheels of {profile.name} by hash")
        hashed = ["--require-hashes", "--no-deps"]
        with Counter(progress, f"wheels of {profile.name}", count, "wheels") as counter:
            arguments = [*hashed, "-r", str(profile.lock_path), "-d", str(beside)]
            _pip_download(profile, arguments, Fetched(counter.add).hear)
        _pip_download(profile, [*hashed, "-r", str(INSTALLER_LOCK), "-d", str(beside / "installer")], lambda _: None)
        if profile.torch is not None:
            progress(f"downloading torch {profile.torch}")
            # The number of its dependencies is not known in advance.
            with Counter(progress, f"torch {profile.torch}", 1, "downloads") as counter:
                _pip_download(profile, _torch_arguments(profile, beside, Path(name)), lambda _: None)
                counter.add()
        write_record(beside / _RECORD, _digests(beside))
        check_wheels(profile, beside)
        try:
            beside.rename(folder)
        except OSError:  # another process made the same folder meanwhile
            if not folder.is_dir():
                raise
    return folder


def check_wheels(profile: RuntimeProfile, folder: Path) -> None:
    """Compare the wheels in ``folder`` with the lock, and with the digests recorded when they were downloaded.

    Raises:
        WheelError: the message names each extra, missing or different wheel.
        ImageError: the record of what was downloaded can't be read.
    """
    found = _digests(folder)
    wrong = differences(folder / _RECORD, found)
    wrong += _against_lock(profile, {Path(name).name: digest for name, digest in found.items() if "/" not in name})
    if wrong:
        raise WheelError(f"the wheels of {profile.name} do not match its lock: {'; '.join(wrong)}; remove {folder}")


def wheels_digest(folder: Path) -> str:
    """Return ``sha256:…`` over names and digests of all wheels in ``folder``, including torch."""
    return "sha256:" + hashlib.sha256((folder / _RECORD).read_bytes()).hexdigest()


def _against_lock(profile: RuntimeProfile, found: dict[str, str]) -> list[str]:
    """Yield the differences between lock and files. A torch pinned by version adds dependencies that are not locked."""
    locked = read_lock(profile.lock_path)
    wrong = []
    seen = set()
    for file, digest in sorted(found.items()):
        name, version = normalized(file.split("-")[0]), file.split("-")[1]
        seen.add(name)
        if name in locked:
            if digest not in locked[name][1]:
                wrong.append(f"`{file}` has sha256 {digest}, which the lock does not allow")
        elif profile.torch is None:
            wrong.append(f"`{file}` is not in the lock")
        elif name == "torch" and version.partition("+")[0] != profile.torch:
            wrong.append(f"`{file}` is not torch {profile.torch}")
    wanted = locked.keys() | ({"torch"} if profile.torch else set())
    return wrong + [f"`{name}` is missing" for name in sorted(wanted - seen)]


def _key(profile: RuntimeProfile) -> str:
    """What is asked for: the lock's bytes, the installer's, torch's version and Python's."""
    parts = [profile.python, str(profile.torch), *platforms(profile)]
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in (profile.lock_path, INSTALLER_LOCK):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:24]


def platforms(profile: RuntimeProfile) -> tuple[str, ...]:
    """Return the tags of wheels that run in the image: x86-64, and a glibc not newer than its own.

    pip expands none of these by itself.
    """
    newest = int(profile.platform.rpartition("_")[2])
    glibc = (f"manylinux_2_{minor}_x86_64" for minor in range(newest, 4, -1))
    return ("linux_x86_64", *glibc, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64")


def _torch_arguments(profile: RuntimeProfile, folder: Path, scratch: Path) -> list[str]:
    """Fetch torch by version with what this build of it needs beyond the lock (the CUDA build: its libraries)."""
    constraints = scratch / "constraints.txt"
    lines = [f"{name}=={version}" for name, (version, _) in read_lock(profile.lock_path).items()]
    constraints.write_text("\n".join(lines))
    return [f"torch=={profile.torch}", "-c", str(constraints), "--find-links", str(folder), "-d", str(folder)]


class Fetched:
    """Counts wheels, and their megabytes, by what pip says.

    pip names a file when it begins with it: the one before has come by then, and the last when pip has ended.
    """

    def __init__(self, add: Callable[[float, str], None]) -> None:
        """Tell ``add`` how many more wheels have come, and how many megabytes in all."""
        self._add = add
        self._under_way = False
        self._megabytes = 0.0

    def hear(self, line: str) -> None:
        """Take in one line of pip's."""
        found = _FETCHING.match(line)
        if found is None:
            return
        if self._under_way:
            self._add(1.0, f"{self._megabytes:,.0f} MB")
        self._under_way = found["what"] != "Saved"
        self._megabytes += float(found["size"] or 0) * _MEGABYTES.get(found["unit"] or "", 0.0)


def _pip_download(profile: RuntimeProfile, arguments: Sequence[str], hear: Progress) -> None:
    """Run ``pip download`` for the image's Python and platform; ``hear`` gets what it says, line by line."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--disable-pip-version-check",
        "--no-input",
        "--progress-bar=off",
    ]
    command += [
        "--only-binary=:all:",
        "--implementation=cp",
        f"--python-version={profile.python.removeprefix('python')}",
    ]
    command += [f"--platform={platform}" for platform in platforms(profile)]
    command += arguments
    output: list[str] = []
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            for line in process.stdout or ():
                output.append(line.strip())
                hear(output[-1])
        except BaseException:  # a person's Ctrl-C among them: the child must not go on
            process.kill()
            raise
    if process.returncode != 0:
        raise WheelError(f"the wheels of {profile.name} could not be fetched: {_reason(output)}")


def _reason(output: list[str]) -> str:
    """Find in pip's words which wheel is wrong, or the error that it gave up with."""
    for number, line in enumerate(output):
        if line.startswith("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES"):
            culprit = next((words for words in output[number + 1 :] if "Expected sha256" not in words and words), line)
            got = next((words for words in output[number:] if words.startswith("Got")), "")
            return f"`{culprit.split(' from ')[0].rstrip(':')}` does not have the hash that the lock names ({got})"
    if any("No space left on device" in line for line in output):
        return "the disk is full"
    errors = [line.removeprefix("ERROR: ") for line in output if line.startswith("ERROR: ")]
    if errors:
        return errors[-1]
    return output[-1] if output else "pip printed nothing"


def _digests(folder: Path) -> dict[str, str]:
    """Name (``installer/…`` for what installs them) → sha256 of every wheel, streamed."""
    return digests(folder, (path for path in folder.rglob("*") if path.is_file() and path.name != _RECORD))


def forget_wheels(profile: RuntimeProfile, cache: Path) -> None:
    """Remove the fetched wheels of ``profile``; they are fetched again when they are needed."""
    shutil.rmtree(cache / _key(profile), ignore_errors=True)
