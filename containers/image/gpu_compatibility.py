"""Checks before a container starts whether GPUs can run an image.

An image has its requirements as labels: the oldest driver and CUDA, the architectures of its kernels, the size of its
weights, and of the cache for one request of the longest served context. Without the check, an old driver would crash
deep in CUDA, and a small GPU would run out of memory minutes later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import docker

from containers.errors import ContainerError
from containers.hardware.gpu import Gpu, gpus
from containers.image.profile import RuntimeProfile

RUNTIME = "slipway.runtime"
DRIVER = "slipway.minimum.driver"
CUDA = "slipway.minimum.cuda"
CAPABILITIES = "slipway.gpu.capabilities"
MODEL_BYTES = "slipway.model.bytes"
CACHE_BYTES = "slipway.cache.bytes"
# Share of a GPU's memory that stays free for activations, CUDA and unforeseen needs.
HEADROOM = 0.2


class GpuError(ContainerError):
    """This machine's GPU can't run the image. The message says what is required and what was found."""


@dataclass(frozen=True)
class Needs:
    """An image's requirements of a GPU; None, empty or zero if there is none."""

    runtime: str
    driver: str | None = None
    cuda: str | None = None
    capabilities: tuple[str, ...] = ()
    model_bytes: int = 0
    cache_bytes: int = 0

    @property
    def memory_bytes(self) -> int:
        """Memory required for weights, cache and headroom."""
        return round((self.model_bytes + self.cache_bytes) / (1 - HEADROOM))

    def of_one_among(self, gpus: int) -> Needs:
        """Return the requirements of each GPU if the model is divided among ``gpus``."""
        return replace(self, model_bytes=self.model_bytes // gpus, cache_bytes=self.cache_bytes // gpus)


def needs_of(labels: Mapping[str, str]) -> Needs:
    """Read the requirements from an image's labels."""
    return Needs(
        runtime=labels.get(RUNTIME, "the image"),
        driver=labels.get(DRIVER),
        cuda=labels.get(CUDA),
        capabilities=tuple(labels.get(CAPABILITIES, "").split()),
        model_bytes=int(labels.get(MODEL_BYTES, 0)),
        cache_bytes=int(labels.get(CACHE_BYTES, 0)),
    )


def labels_of(profile: RuntimeProfile) -> dict[str, str]:
    """Return the labels with a runtime's requirements; none if it needs no GPU."""
    driver = profile.minimum_driver
    if driver is None:
        return {}
    return {DRIVER: driver.driver, CUDA: driver.cuda, CAPABILITIES: " ".join(profile.gpu_capabilities)}


def problems(needs: Needs, gpu: Gpu) -> list[str]:
    """Return every reason why a GPU can't run the image, with required and found values; empty if it can."""
    found = []
    if needs.driver and gpu.driver and _version(gpu.driver) < _version(needs.driver):
        found.append(f"{needs.runtime} needs NVIDIA driver {needs.driver} or later, but this host has {gpu.driver}")
    if needs.cuda and gpu.cuda and gpu.cuda < _version(needs.cuda):
        has = ".".join(map(str, gpu.cuda))
        found.append(f"{needs.runtime} needs a driver for CUDA {needs.cuda}, but this host's driver is for {has}")
    if needs.capabilities and not any(_runs(each, gpu.capability) for each in needs.capabilities):
        has = ".".join(map(str, gpu.capability))
        known = ", ".join(needs.capabilities)
        found.append(f"{needs.runtime} has kernels for compute capability {known}, but {gpu.name} has {has}")
    if needs.memory_bytes > gpu.memory_bytes:
        found.append(
            f"{_gib(needs.model_bytes)} of weights and {_gib(needs.cache_bytes)} of cache take a GPU of "
            f"{_gib(needs.memory_bytes)} with {HEADROOM:.0%} left free, and {gpu.name} has {_gib(gpu.memory_bytes)}"
        )
    return found


def check(client: docker.DockerClient, image: str, devices: Sequence[str]) -> None:
    """Refuse an image that the GPUs ``devices`` (index or UUID) can't run; accept an image without requirements.

    On a host without a driver, an image that needs one is refused only if GPUs were requested. Else it may run on a
    remote engine, whose driver can't be seen from here.

    Raises:
        GpuError: the message names each requirement that is not met, and what was found.
    """
    try:
        labels = client.images.get(image).labels or {}
    except docker.errors.DockerException:
        return  # starting the container reports the missing GPU
    needs = needs_of(labels)
    if needs.driver is None:
        return
    here = gpus()
    wrong = []
    for device in devices:
        found = next((each for each in here if device in {each.uuid, str(each.index)}), None)
        if found is None:
            asked = f"{needs.runtime} needs NVIDIA driver {needs.driver} or later"
            raise GpuError(f"{asked}, but NVML knows no GPU `{device}`")
        wrong += problems(needs.of_one_among(len(devices)), found)
    if wrong:
        raise GpuError("; ".join(dict.fromkeys(wrong)))


def _runs(kernels: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture runs on a GPU: same major version, not newer (CUDA's binary compatibility)."""
    major, minor = _version(kernels)[:2]
    return capability[0] == major and capability[1] >= minor


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
