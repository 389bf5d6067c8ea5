"""The gateway's image: the CPU runtime's base, the wheels of the gateway's own environment, and its modules.

Put together as a release's image is: wheels by hash, no network, the same bytes anywhere. It runs as a numeric user on
a read-only root, with its settings in ``/etc/slipway/gateway.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import docker
from pydantic import BaseModel, ConfigDict

from containers.gateway.config import Settings
from containers.image.build import place_image
from containers.image.layers import FileLayer, Member, archive
from containers.image.profile import RuntimeProfile, load
from containers.image.runtime import build_runtime, health_check
from registry.digests import canonical_json, digest_of
from registry.progress import Progress

# A release line's name is MODEL-SCHEME: none is called this.
NAME = "gateway"
_PACKAGE = Path(__file__).parent.parent
# Where the modules lie, and what is run from: the folder that holds them is the first place Python looks in.
_FOLDER = "gateway"
_PORT, _ADMIN_PORT = (Settings.model_fields[name].default for name in ("port", "admin_port"))


class GatewayImage(BaseModel):
    """What was built. ``reference`` is ``REPOSITORY@sha256:…`` once it is in a registry, else the engine's image id.

    ``digest`` is that of its OCI manifest, ``contents`` that of all that decides it but for its base: a gateway that
    was changed since has another. ``size_bytes`` is uncompressed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    reference: str
    pushed: bool
    digest: str
    image_id: str
    contents: str
    size_bytes: int


def build_gateway_image(
    client: docker.DockerClient, requirements: Path, home: Path, progress: Progress, *, registry: str | None = None
) -> GatewayImage:
    """Put the gateway's image together; push it where ``registry`` (a repository's prefix) is given.

    ``requirements`` is the folder that holds the pins of the gateway's environment, ``gateway.txt``.

    Raises:
        ImageError, WheelError, EngineError: in one line each; nothing half-made bears a tag.
    """
    profile = _profile(requirements)
    runtime = build_runtime(client, profile, home, progress)
    digest = contents(requirements)
    version = digest.removeprefix("sha256:")[:12]
    labels = {
        "org.opencontainers.image.title": NAME,
        "org.opencontainers.image.description": "keys, limits and routing before a release's replicas",
        "org.opencontainers.image.version": version,
        "slipway.gateway.contents": digest,
    }
    placed = place_image(
        client, runtime, [_modules()], _settings(profile), name=NAME, version=version, labels=labels, home=home,
        progress=progress, registry=registry,
    )  # fmt: skip
    return GatewayImage(
        reference=placed.reference,
        pushed=registry is not None,
        digest=placed.image.digest,
        image_id=placed.image_id,
        contents=digest,
        size_bytes=placed.size_bytes,
    )


def contents(requirements: Path) -> str:
    """Return ``sha256:…`` over the pins, the modules and the image's settings of the gateway as they are now."""
    profile = _profile(requirements)
    return digest_of(canonical_json([profile.pins_digest(), _modules().key, _settings(profile)]))


def _profile(requirements: Path) -> RuntimeProfile:
    """The CPU runtime's base and Python, with the pins of the environment in which `slipway serve` runs the gateway."""
    like = load("vllm-cpu")
    return RuntimeProfile(
        name=NAME,
        base=like.base,
        python=like.python,
        platform=like.platform,
        lock="gateway.txt",
        folder=requirements,
        # A bundle runs `python` in it by that name.
        environment={"PATH": "/opt/venv/bin:/usr/local/bin:/usr/bin:/bin"},
        entrypoint=("/opt/venv/bin/python", "-m", "containers.gateway"),
        arguments=("--config", "/etc/slipway/gateway.json"),
        user=65534,
    )


def _settings(profile: RuntimeProfile) -> dict[str, Any]:
    return {
        "Cmd": list(profile.arguments),
        "WorkingDir": f"/{_FOLDER}",
        "ExposedPorts": {f"{port}/tcp": {} for port in (_PORT, _ADMIN_PORT)},
        "Healthcheck": health_check(_ADMIN_PORT, 10),
    }


def _modules() -> FileLayer:
    """The package, and what it takes of the one around it."""
    paths = [_PACKAGE / "__init__.py", _PACKAGE / "errors.py", *(_PACKAGE / "gateway").glob("*.py")]
    root = _PACKAGE.parent
    return archive([Member(f"{_FOLDER}/{path.relative_to(root).as_posix()}", path.read_bytes()) for path in paths])
