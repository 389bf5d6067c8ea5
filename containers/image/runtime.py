"""A runtime: a base, and the wheels of a profile's lock in ``/opt/venv``, as layers shared by the images of all models.

Downloading (wheels by hash, the base by digest) is a separate step: the assembly has no network. Its result is exported
as a normalized layer, so the same wheels on the same base give the same runtime on any machine.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker

from containers.image import loading
from containers.image.assembly import ran, taken
from containers.image.base import BaseImage, ensure_base, given_base, store_of
from containers.image.blobs import Blob, BlobStore
from containers.image.gpu_compatibility import labels_of
from containers.image.layers import Member, archive, plain_files
from containers.image.model_loader import loader_layer
from containers.image.oci import OciImage
from containers.image.profile import RUNTIMES, SCRIPTS, RuntimeProfile
from containers.image.wheels import check_wheels, fetch_wheels, wheels_digest
from registry.atomic_write import write_atomically
from registry.digests import canonical_json, digest_of
from registry.file_locks import locked
from registry.progress import Progress

REPOSITORY = "slipway-runtime"
PORT = 8000
_NANOSECONDS = 1_000_000_000
_HEALTHY = "import urllib.request as r; r.urlopen('http://127.0.0.1:{port}/health', timeout=4)"


@dataclass(frozen=True)
class Runtime:
    """A runtime, in the engine as ``image_id``, with everything needed to add layers to it."""

    image_id: str
    image: OciImage
    comments: tuple[str, ...]

    @property
    def labels(self) -> Mapping[str, str]:
        """The labels of images that use this runtime."""
        labels: Mapping[str, str] = self.image.settings["Labels"]
        return labels

    @property
    def layers(self) -> tuple[Blob, ...]:
        """The layers of the base, of the wheels, and of the loader that verifies models."""
        return self.image.layers


def build_runtime(
    client: docker.DockerClient, profile: RuntimeProfile, home: Path, progress: Progress, *,
    base: str | None = None, wheels: Path | None = None,
) -> Runtime:  # fmt: skip
    """Return the runtime. It is assembled if this home does not have it with these pins and this base.

    ``base`` (an image of the engine) replaces the profile's; ``wheels`` (a folder made by ``fetch_wheels``) replaces
    the downloaded ones.

    Raises:
        ImageError, WheelError, EngineError: each with one line. No incomplete runtime is stored.
    """
    store = store_of(home)
    (store.root / "runtimes").mkdir(parents=True, exist_ok=True)
    # Two concurrent builds would do the same minutes of work twice.
    with locked(store.root / "runtimes" / f"{profile.name}.lock"):
        start = given_base(client, base, home) if base else ensure_base(client, profile, home, progress)
        found = _kept(profile, start, store)
        if found is None:
            folder = wheels or fetch_wheels(profile, home / "wheels", progress)
            if wheels is not None:
                check_wheels(profile, folder)
            found = _assembled(client, profile, start, folder, home, progress)
        loader = (store.plain(loader_layer(profile.python).chunks()),) if profile.verifies else ()
        image = _put_together(profile, start, *found, loader)
        tag = f"{REPOSITORY}:{profile.name}-{profile.pins_digest().removeprefix('sha256:')[:12]}"
        loaded = loading.load(client, image, tag)
    return Runtime(str(loaded.id), image, image.comments)


def render(profile: RuntimeProfile) -> dict[str, str]:
    """Return the assembly's scripts: ``assemble.sh``, and the files that it runs or copies into the runtime."""
    describe = ""
    if profile.describe_models:
        environment = shlex.join(f"{name}={value}" for name, value in sorted(profile.full_environment.items()))
        describe = f"env {environment} PYTHONHASHSEED=0 /opt/venv/bin/python -W ignore /describe_models.py"
    values = {"python": profile.python, "omit": " ".join(profile.omit), "describe": describe}
    values["cpu_kernels"] = str(profile.cpu_kernels).lower()
    # A missing value is a KeyError. `$name` without braces is the shell's and stays.
    template = (RUNTIMES / "assemble.sh").read_text(encoding="utf-8")
    script = re.sub(r"\$\{([a-z_]+)\}", lambda match: values[match[1]], template)
    others = {name: (RUNTIMES / name).read_text(encoding="utf-8") for name in SCRIPTS}
    return {"assemble.sh": script, **others}


def health_check(port: int, start_seconds: int) -> dict[str, object]:
    """Return an image's health check: ``/health`` on its port. It may fail during the start period."""
    return {
        "Test": ["CMD", "/opt/venv/bin/python", "-I", "-S", "-c", _HEALTHY.format(port=port)],
        "Interval": 10 * _NANOSECONDS, "Timeout": 5 * _NANOSECONDS, "StartPeriod": start_seconds * _NANOSECONDS,
    }  # fmt: skip


def _assembled(
    client: docker.DockerClient, profile: RuntimeProfile, start: BaseImage, folder: Path, home: Path,
    progress: Progress,
) -> tuple[Blob, str]:  # fmt: skip
    """Install the wheels in a container without network, and store the result as a layer."""
    began = time.monotonic()
    what = f"the runtime {profile.name}"
    progress(f"assembling {what} (once for all models)")
    scripts = [Member(name, text.encode()) for name, text in render(profile).items()]
    files = archive([*plain_files(folder, "wheels"), *scripts])
    store, command = store_of(home), ["/bin/sh", "/assemble.sh"]
    with ran(client, start.reference, command, what=what, home=home, progress=progress, files=files) as box:
        layer = store.plain(taken(box, "/opt/venv", what=what))
    record = {"digest": layer.digest, "size": layer.size, "wheels": wheels_digest(folder)}
    path = _place(profile, start, store)
    write_atomically(path, canonical_json(record))
    progress(f"{what} assembled in {time.monotonic() - began:.0f} s: {layer.size / 1e9:.2f} GB, {layer.digest[:19]}")
    return layer, str(record["wheels"])


def _kept(profile: RuntimeProfile, start: BaseImage, store: BlobStore) -> tuple[Blob, str] | None:
    try:
        record = json.loads(_place(profile, start, store).read_text())
    except FileNotFoundError:
        return None
    if not store.has(record["digest"], record["size"]):
        return None
    return store.layer(record["digest"], record["size"]), record["wheels"]


def _place(profile: RuntimeProfile, start: BaseImage, store: BlobStore) -> Path:
    key = digest_of(canonical_json([profile.contents_digest(), [layer.diff_id for layer in start.layers]]))
    return store.root / "runtimes" / f"{key.removeprefix('sha256:')}.json"


def _put_together(
    profile: RuntimeProfile, start: BaseImage, layer: Blob, wheels: str, loader: tuple[Blob, ...]
) -> OciImage:
    inherited = dict(variable.partition("=")[::2] for variable in start.settings.get("Env") or [])
    environment = {**inherited, **profile.full_environment}
    settings: dict[str, Any] = {
        "User": f"{profile.user}:{profile.user}",
        "Env": [f"{name}={value}" for name, value in sorted(environment.items())],
        "Entrypoint": list(profile.entrypoint),
        "WorkingDir": "/tmp",  # noqa: S108 - the one writable place of a read-only container
        "ExposedPorts": {f"{PORT}/tcp": {}},
        "StopSignal": "SIGTERM",
        "Healthcheck": health_check(PORT, 300),
        "Labels": {
            **profile.labels,
            **labels_of(profile),
            "slipway.pins.digest": profile.pins_digest(),
            "slipway.base.digest": start.digest,
            "slipway.base.name": start.name,
            "slipway.runtime": profile.name,
            "slipway.wheels.digest": wheels,
        },
    }  # fmt: skip
    comments = (*(f"base {start.name}" for _ in start.layers), f"runtime {profile.name}", *("loader" for _ in loader))
    return OciImage(settings, (*start.layers, layer, *loader), comments, {})
