"""The images of Slipway's own programs: the CPU runtime's base, the wheels of an environment, and our modules.

They are assembled like a release's image: wheels by hash, no network, the same bytes on any machine. They run as a
numeric user with a read-only root file system.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import docker
from pydantic import BaseModel, ConfigDict

from containers.image.build import place_image
from containers.image.layers import FileLayer
from containers.image.profile import RuntimeProfile, load
from containers.image.runtime import build_runtime
from registry.digests import canonical_json, digest_of
from registry.progress import Progress


class ProgramImage(BaseModel):
    """A program's image. ``reference`` is ``REPOSITORY@sha256:…`` if it is in a registry, else the engine's image id.

    ``digest`` is that of its OCI manifest. ``contents`` covers everything that determines it except the base, so it
    changes with the program's code. ``size_bytes`` is uncompressed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    reference: str
    pushed: bool
    digest: str
    image_id: str
    contents: str
    size_bytes: int


@dataclass(frozen=True)
class Program:
    """What an image runs: the ``profile`` of its environment, its ``modules``, and the image's ``settings``."""

    description: str
    profile: RuntimeProfile
    modules: FileLayer
    settings: Mapping[str, object]

    @property
    def contents(self) -> str:
        """``sha256:…`` over its pins, modules and settings."""
        return digest_of(canonical_json([self.profile.pins_digest(), self.modules.key, self.settings]))


def profile(
    name: str, requirements: Path, environment: Mapping[str, str], entrypoint: tuple[str, ...],
    arguments: tuple[str, ...],
) -> RuntimeProfile:  # fmt: skip
    """Return the CPU runtime's base and Python with the pins of ``requirements/NAME.txt``."""
    like = load("vllm-cpu")
    return RuntimeProfile(
        name=name,
        base=like.base,
        python=like.python,
        platform=like.platform,
        lock=f"{name}.txt",
        folder=requirements,
        environment=environment,
        entrypoint=entrypoint,
        arguments=arguments,
        user=65534,
    )


def build_program_image(
    client: docker.DockerClient, program: Program, home: Path, progress: Progress, *, registry: str | None = None
) -> ProgramImage:
    """Assemble a program's image; push it if ``registry`` (a repository's prefix) is given.

    Raises:
        ImageError, WheelError, EngineError: each with one line. No incomplete image gets a tag.
    """
    name, digest = program.profile.name, program.contents
    version = digest.removeprefix("sha256:")[:12]
    labels = {
        "org.opencontainers.image.title": name,
        "org.opencontainers.image.description": program.description,
        "org.opencontainers.image.version": version,
        f"slipway.{name}.contents": digest,
    }
    placed = place_image(
        client, build_runtime(client, program.profile, home, progress), [program.modules], program.settings,
        name=name, version=version, labels=labels, home=home, progress=progress, registry=registry,
    )  # fmt: skip
    return ProgramImage(
        reference=placed.reference,
        pushed=registry is not None,
        digest=placed.image.digest,
        image_id=placed.image_id,
        contents=digest,
        size_bytes=placed.size_bytes,
    )
