"""Making a runtime's lock: the one place where a tag becomes a digest, and a requirement versions with hashes."""

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
from containers.image.profile import RuntimeProfile, inputs, lock_digest, read_lock
from registry.digests import digest_of
from registry.progress import Progress

SCHEMA = "slipway.runtime-lock/v2"


@dataclass(frozen=True)
class Locked:
    """What a lock says now and said before. ``changes`` are lines for a person, none where nothing changed."""

    name: str
    base: str | None
    packages: int
    changes: tuple[str, ...]


def lock(profile: RuntimeProfile, progress: Progress, *, variables: Mapping[str, str], upgrade: bool = False) -> Locked:
    """Resolve a profile and write ``<lock>.txt`` and ``<lock>.lock.json`` beside it; both or neither.

    Versions that the lock has stay where they still fit, unless ``upgrade`` is given. ``variables`` are what the
    package installer may see of the environment. A base whose registry can't be reached keeps the digest that is locked
    for that very tag.

    Raises:
        ProfileError: the requirements can't be resolved, with the resolver's words.
        DistributionError: the base's tag can't be resolved, and no digest is locked for it.
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
        # The requirements first: a death between the two leaves a lock that is refused by name.
        made.rename(profile.lock_path)
        (Path(folder) / "lock.json").rename(profile.lock_path.with_suffix(".lock.json"))
    return Locked(profile.name, base, len(new), changes)


def _lock_file(profile: RuntimeProfile) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(profile.lock_path.with_suffix(".lock.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def _resolved_base(profile: RuntimeProfile, before: Mapping[str, str], progress: Progress) -> str | None:
    """The base's tag with the digest that its registry has it under today; None for a base that is made here."""
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
            progress(f"{error}: {tagged} keeps the digest that is locked")
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
    uv = Path(sys.executable).parent / "uv"
    command = [
        str(uv) if uv.exists() else "uv", "pip", "compile", "-q", "--generate-hashes", "--only-binary", ":all:",
        "--no-emit-index-url", "--no-header", "--no-annotate", "--python-platform", profile.platform,
        "--python-version", profile.python.removeprefix("python"), "-o", str(target),
    ]  # fmt: skip
    command += ["--override", str(override)] if override.is_file() else []
    # torch by hash is the package index's build, and no machine's own.
    environment = {name: value for name, value in variables.items() if not name.endswith("_FIND_LINKS")}
    done = subprocess.run(
        [*command, str(source)], env={"PATH": os.defpath, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        words = " ".join(done.stderr.split())[-600:]
        raise ProfileError(f"the requirements of {profile.name} can't be resolved: {words}")


def _base_changes(before: str | None, after: str | None) -> list[str]:
    return [] if before == after else [f"base: {before or 'none'} → {after or 'none'}"]


def _changes(
    before: Mapping[str, tuple[str, frozenset[str]]], after: Mapping[str, tuple[str, frozenset[str]]]
) -> list[str]:
    """A line for every distribution that came, went, moved or has other files."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old is None or new is None or old[0] != new[0]:
            lines.append(f"{name}: {old[0] if old else 'none'} → {new[0] if new else 'none'}")
        elif old[1] != new[1]:
            lines.append(f"{name} {new[0]}: {len(new[1] - old[1])} files more, {len(old[1] - new[1])} less")
    return lines
