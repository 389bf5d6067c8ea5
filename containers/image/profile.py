"""Runtime profiles, ``containers/runtimes/*.yaml``, and their locks: the pinned runtime of a release."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from containers.errors import ProfileError
from containers.image.layers import EPOCH, FORMAT
from containers.image.model_loader import NAME, loader_layer
from registry.suggestions import suggestion

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

RUNTIMES = Path(__file__).parent.parent / "runtimes"
# Set in every runtime, whatever its profile says: a temporary home, no network access, no usage reports.
ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "HOME": "/tmp",  # noqa: S108 - the one place that is writable in a read-only container
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
# A tag, which is for people, and a digest. A profile has the tag; its lock adds the digest.
TAGGED_IMAGE = r"^[a-z0-9][a-z0-9._/:-]*(@sha256:[0-9a-f]{64})?$"
PINNED_IMAGE = r"^[a-z0-9][a-z0-9._/:-]*@sha256:[0-9a-f]{64}$"
_PINNED_LINE = re.compile(r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[^\s;\\]+)")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")

DebianName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9+.-]*$")]
RelativePath = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*$")]
Word = Annotated[str, StringConstraints(pattern=r"^[^\s]+$")]
EnvironmentName = Annotated[str, StringConstraints(pattern=r"^[A-Z_][A-Z0-9_]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DebianRecipe(_Strict):
    """A base made here from Debian packages, for machines that can't pull images."""

    suite: DebianName
    packages: tuple[DebianName, ...]


class Base(_Strict):
    """The base of an image: an image by digest, or a recipe.

    ``packages`` are installed on an image in a separate step, from the archive's snapshot at ``snapshot``
    (``YYYYMMDDTHHMMSSZ``, as in apt's ``--snapshot``).
    """

    image: Annotated[str, StringConstraints(pattern=TAGGED_IMAGE)] | None = None
    debian: DebianRecipe | None = None
    packages: tuple[DebianName, ...] = ()
    snapshot: Annotated[str, StringConstraints(pattern=r"^\d{8}T\d{6}Z$")] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Base:
        if (self.image is None) == (self.debian is None):
            raise ValueError("expected either `image` or `debian`")
        if self.packages and self.image is None:
            raise ValueError("with `debian`, list packages in `debian.packages`")
        if bool(self.packages) != bool(self.snapshot):
            raise ValueError("`packages` needs `snapshot`, and `snapshot` needs `packages`")
        return self


class MinimumDriver(_Strict):
    """The oldest NVIDIA driver that supports the runtime's CUDA."""

    cuda: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+$")]
    driver: Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+){1,2}$")]

    @property
    def requirement(self) -> str:
        """The value of ``NVIDIA_REQUIRE_CUDA``: a comma means *and* (a space would mean *or*)."""
        return f"cuda>={self.cuda},driver>={self.driver}"


class RuntimeProfile(_Strict):
    """A runtime. ``name`` is the name of its file; the other fields are the keys in it."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    base: Base
    python: Annotated[str, StringConstraints(pattern=r"^python3\.\d+$")]
    lock: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]*\.txt$")]
    platform: Annotated[str, StringConstraints(pattern=r"^x86_64-manylinux_2_\d+$")] = "x86_64-manylinux_2_28"
    torch: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+\.\d+$")] | None = None
    omit: tuple[RelativePath, ...] = ()
    describe_models: bool = False
    cpu_kernels: bool = False
    environment: Mapping[EnvironmentName, str] = Field(default_factory=dict)
    entrypoint: tuple[Word, ...] = Field(min_length=1)
    arguments: tuple[Word, ...] = ()
    user: Annotated[int, Field(gt=0)]
    minimum_driver: MinimumDriver | None = None
    gpu_capabilities: tuple[Annotated[str, StringConstraints(pattern=r"^\d+\.\d+$")], ...] = ()
    labels: Mapping[str, str] = Field(default_factory=dict)
    folder: Path = Field(default=RUNTIMES, exclude=True)

    @property
    def lock_path(self) -> Path:
        """The file with pinned versions and hashes."""
        return self.folder / self.lock

    @property
    def verifies(self) -> bool:
        """Whether its entry point is the loader that verifies models."""
        return NAME in self.entrypoint

    @property
    def full_environment(self) -> dict[str, str]:
        """The image's environment variables: those of every runtime, the profile's, and the driver's constraint."""
        driver = {"NVIDIA_REQUIRE_CUDA": self.minimum_driver.requirement} if self.minimum_driver else {}
        return {**ENVIRONMENT, **self.environment, **driver}

    def contents_digest(self) -> str:
        """Return ``sha256:…`` over everything that determines the runtime's layer, except the base's content."""
        names = ("python", "torch", "omit", "describe_models", "cpu_kernels")
        environment = self.full_environment if self.describe_models else {}
        return self._digest({**{name: getattr(self, name) for name in names}, "environment": environment})

    def pins_digest(self) -> str:
        """Return ``sha256:…`` over everything that determines the runtime, except the base's content.

        It covers every byte of the profile, its lock, the installer's lock, the assembly's scripts and the loader, and
        the version of the layers' format.
        """
        loader = {"loader": loader_layer(self.python).key} if self.verifies else {}
        return self._digest({**self.model_dump(mode="json"), **loader})

    def _digest(self, profile: Mapping[str, object]) -> str:
        covered = {
            "profile": profile,
            "files": {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (self.lock_path, *_INSTALLER)
            },
            "layers": [FORMAT, EPOCH],
        }
        text = json.dumps(covered, sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


# Files that the assembly's script runs or copies into the runtime.
KERNELS = tuple(f"slipway_kernels/{path.name}" for path in sorted((RUNTIMES / "slipway_kernels").glob("*.py")))
SCRIPTS = ("compile.py", "describe_models.py", "slipway_torch.py", *KERNELS)
_INSTALLER = tuple(RUNTIMES / name for name in ("assemble.sh", *SCRIPTS, "installer.txt"))


def names(folder: Path = RUNTIMES) -> list[str]:
    """Return the names of all profiles."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load(name: str, folder: Path = RUNTIMES) -> RuntimeProfile:
    """Read the profile ``name`` and check that its lock exists and pins everything with hashes.

    Raises:
        ProfileError: no such profile, an unknown, missing or wrong key (all are listed), or a lock that does not match.
    """
    profile = held_to_lock(stated(name, folder))
    path = folder / f"{name}.yaml"
    locked = read_lock(profile.lock_path)
    if ("torch" in locked) == (profile.torch is not None):
        raise ProfileError(f"{path.name}: torch is pinned either by version in `torch` or by hash in {profile.lock}")
    return profile


def stated(name: str, folder: Path = RUNTIMES) -> RuntimeProfile:
    """Read the profile ``name`` without its lock, as `lock` does to make one.

    Raises:
        ProfileError: no such profile, or an unknown, missing or wrong key; all are listed.
    """
    path = folder / f"{name}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ProfileError(
            f"no runtime `{name}`{suggestion(name, names(folder))} (profiles are in {folder})"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ProfileError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ProfileError(f"{path.name} contains {type(content).__name__}, expected keys and values")
    try:
        return RuntimeProfile.model_validate({**content, "name": name, "folder": folder})
    except ValidationError as error:
        raise ProfileError(f"{path.name}: {'; '.join(_explain(item) for item in error.errors())}") from error


def inputs(profile: RuntimeProfile) -> dict[str, str]:
    """Return the inputs of a lock: name → its digest or its value.

    Comments and blank lines of the requirements are ignored.
    """
    given = {"python": profile.python, "platform": profile.platform, "torch": str(profile.torch)}
    base = profile.base
    given["base"] = json.dumps(base.model_dump(mode="json") | {"image": (base.image or "").partition("@")[0]})
    for suffix in ("in", "override"):
        path = profile.lock_path.with_suffix(f".{suffix}")
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        wanted = [line.partition(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]
        given["requirements" if suffix == "in" else "overrides"] = "; ".join(wanted)
    return given


def lock_digest(made_of: Mapping[str, str], base: str | None, requirements: str) -> str:
    """Return the ``digest`` of a lock, over its other content, so that manual edits are detected."""
    text = json.dumps([made_of, base, requirements], sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def held_to_lock(profile: RuntimeProfile) -> RuntimeProfile:
    """Return the profile with its base's digest from the lock, after checking the lock.

    Raises:
        ProfileError: the lock is missing, was made from other inputs than the profile has now, or was edited manually;
            the message names the differences.
    """
    path = profile.lock_path.with_suffix(".lock.json")
    remedy = f"run `slipway lock {profile.name}`"
    try:
        lock = json.loads(path.read_text(encoding="utf-8"))
        made_of, base, requirements = lock["made_of"], lock["base"], lock["requirements"]
        given = lock["digest"]
    except FileNotFoundError as error:
        raise ProfileError(f"the lock {path.name} is missing: {remedy}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ProfileError(f"the lock {path.name} is not valid ({type(error).__name__} {error}): {remedy}") from error
    now = inputs(profile)
    changed = sorted(name for name in now.keys() | made_of.keys() if now.get(name) != made_of.get(name))
    if changed:
        named = ", ".join(f"`{name}`" for name in changed)
        raise ProfileError(f"the lock of {profile.name} is outdated, since {named} changed: {remedy}")
    if profile.lock_path.is_file() and f"sha256:{_sha256(profile.lock_path)}" != requirements:
        raise ProfileError(f"{profile.lock} does not match {path.name}: one of them was edited manually: {remedy}")
    if given != lock_digest(made_of, base, requirements):
        raise ProfileError(f"{path.name} does not match its digest: it was edited manually: {remedy}")
    if profile.base.image is None:
        return profile
    if not re.match(PINNED_IMAGE, str(base)):
        raise ProfileError(f"{path.name} has no digest for {profile.base.image}: {remedy}")
    return profile.model_copy(update={"base": profile.base.model_copy(update={"image": base})})


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_lock(path: Path) -> dict[str, tuple[str, frozenset[str]]]:
    """Return name → (version, allowed sha256 digests) from a lock; names are normalized (PEP 503).

    Raises:
        ProfileError: the file is missing, or a requirement is not pinned by version and hash.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ProfileError(f"the lock {path} is missing: `slipway lock` makes it") from error
    locked: dict[str, tuple[str, frozenset[str]]] = {}
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _PINNED_LINE.match(line)
        hashes = frozenset(_HASH.findall(line))
        if match is None or not hashes:
            raise ProfileError(f"{path.name}: `{line.split()[0]}` is not pinned by version and hash")
        locked[normalized(match["name"])] = (match["version"], hashes)
    return locked


def normalized(name: str) -> str:
    """Return a distribution's name, normalized as in PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _explain(item: ErrorDetails) -> str:
    """A message for a validation error, with the key's path."""
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        owner = Base if path.startswith("base.") else RuntimeProfile
        return f"unknown key `{path}`{suggestion(path.rpartition('.')[2], owner.model_fields)}"
    if item["type"] == "missing":
        return f"`{path}` is missing"
    return f"`{path}`: {item['msg'].removeprefix('Value error, ')}, found {item['input']!r}"[:300]
