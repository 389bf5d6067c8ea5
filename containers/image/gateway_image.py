"""The gateway's image: the CPU runtime's base, the wheels of the gateway's environment, and its modules.

It is assembled like a release's image: wheels by hash, no network, the same bytes on any machine. It runs as a numeric
user with a read-only root file system. Its settings are in ``/etc/slipway/gateway.json``.
"""

from __future__ import annotations

from pathlib import Path

import docker
from pydantic import BaseModel, ConfigDict

from containers.gateway.config import GatewaySettings
from containers.image.build import place_image
from containers.image.layers import FileLayer, Member, archive
from containers.image.profile import RuntimeProfile, load
from containers.image.runtime import build_runtime, health_check
from registry.digests import canonical_json, digest_of
from registry.progress import Progress

# Can't be the name of a release line, which is MODEL-SCHEME.
NAME = "gateway"
_PACKAGE = Path(__file__).parent.parent
# The working directory that contains the modules: Python imports from it first.
_FOLDER = "gateway"
_PORT, _ADMIN_PORT = (GatewaySettings.model_fields[name].default for name in ("port", "admin_port"))


class GatewayImage(BaseModel):
    """The gateway's image. ``reference`` is ``REPOSITORY@sha256:…`` if it is in a registry, else the engine's image id.

    ``digest`` is that of its OCI manifest. ``contents`` covers everything that determines it except the base, so it
    changes with the gateway's code. ``size_bytes`` is uncompressed.
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
    """Assemble the gateway's image; push it if ``registry`` (a repository's prefix) is given.

    ``requirements`` is the folder with ``gateway.txt``, the pins of the gateway's environment.

    Raises:
        ImageError, WheelError, EngineError: each with one line. No incomplete image gets a tag.
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
    """Return ``sha256:…`` over the gateway's current pins, modules and image settings."""
    profile = _profile(requirements)
    return digest_of(canonical_json([profile.pins_digest(), _modules().key, _settings(profile)]))


def _profile(requirements: Path) -> RuntimeProfile:
    """The CPU runtime's base and Python, with the pins of the environment that `slipway serve` uses for the gateway."""
    like = load("vllm-cpu")
    return RuntimeProfile(
        name=NAME,
        base=like.base,
        python=like.python,
        platform=like.platform,
        lock="gateway.txt",
        folder=requirements,
        # The commands of a bundle start `python`.
        environment={"PATH": "/opt/venv/bin:/usr/local/bin:/usr/bin:/bin"},
        entrypoint=("/opt/venv/bin/python", "-m", "containers.gateway"),
        arguments=("--config", "/etc/slipway/gateway.json"),
        user=65534,
    )


def _settings(profile: RuntimeProfile) -> dict[str, object]:
    return {
        "Cmd": list(profile.arguments),
        "WorkingDir": f"/{_FOLDER}",
        "ExposedPorts": {f"{port}/tcp": {} for port in (_PORT, _ADMIN_PORT)},
        "Healthcheck": health_check(_ADMIN_PORT, 10),
    }


def _modules() -> FileLayer:
    """The gateway's modules, and the others that they import."""
    paths = [_PACKAGE / "__init__.py", _PACKAGE / "errors.py", *(_PACKAGE / "gateway").glob("*.py")]
    root = _PACKAGE.parent
    return archive([Member(f"{_FOLDER}/{path.relative_to(root).as_posix()}", path.read_bytes()) for path in paths])
