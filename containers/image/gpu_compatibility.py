"""May these GPUs run this image? Asked before a container starts, from what the image says of itself.

An image carries its needs as labels, so that whoever has it can ask: the oldest driver and CUDA, the architectures its
kernels are for, its weights, and the cache of one request of the longest context that it serves. A driver that is too
old would otherwise crash deep in CUDA, and a GPU that is too small would run out of memory minutes later.
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
# What of a GPU's memory stays free: activations, CUDA's own, and what is not foreseen.
HEADROOM = 0.2


class GpuError(ContainerError):
    """This machine's GPU can't run the image; the message names what is asked for and what there is."""


@dataclass(frozen=True)
class Needs:
    """What an image asks of a GPU. What it doesn't ask for is None, empty or zero."""

    runtime: str
    driver: str | None = None
    cuda: str | None = None
    capabilities: tuple[str, ...] = ()
    model_bytes: int = 0
    cache_bytes: int = 0

    @property
    def memory_bytes(self) -> int:
        """Weights and cache, in a GPU of which the headroom stays free."""
        return round((self.model_bytes + self.cache_bytes) / (1 - HEADROOM))

    def of_one_among(self, gpus: int) -> Needs:
        """What is asked of each of so many GPUs that the model is divided among."""
        return replace(self, model_bytes=self.model_bytes // gpus, cache_bytes=self.cache_bytes // gpus)


def needs_of(labels: Mapping[str, str]) -> Needs:
    """Read an image's labels."""
    return Needs(
        runtime=labels.get(RUNTIME, "the image"),
        driver=labels.get(DRIVER),
        cuda=labels.get(CUDA),
        capabilities=tuple(labels.get(CAPABILITIES, "").split()),
        model_bytes=int(labels.get(MODEL_BYTES, 0)),
        cache_bytes=int(labels.get(CACHE_BYTES, 0)),
    )


def labels_of(profile: RuntimeProfile) -> dict[str, str]:
    """Return the labels by which images of a runtime say what they need; none where it needs no GPU."""
    driver = profile.minimum_driver
    if driver is None:
        return {}
    return {DRIVER: driver.driver, CUDA: driver.cuda, CAPABILITIES: " ".join(profile.gpu_capabilities)}


def problems(needs: Needs, gpu: Gpu) -> list[str]:
    """Say all that keeps a GPU from running the image, each with both numbers; empty where nothing does."""
    found = []
    if needs.driver and gpu.driver and _version(gpu.driver) < _version(needs.driver):
        found.append(f"{needs.runtime} needs NVIDIA driver {needs.driver} or later, and this host has {gpu.driver}")
    if needs.cuda and gpu.cuda and gpu.cuda < _version(needs.cuda):
        has = ".".join(map(str, gpu.cuda))
        found.append(f"{needs.runtime} needs a driver for CUDA {needs.cuda}, and this host's is for {has}")
    if needs.capabilities and not any(_runs(each, gpu.capability) for each in needs.capabilities):
        has = ".".join(map(str, gpu.capability))
        known = ", ".join(needs.capabilities)
        found.append(f"{needs.runtime} has kernels for compute capability {known}, and {gpu.name} has {has}")
    if needs.memory_bytes > gpu.memory_bytes:
        found.append(
            f"{_gib(needs.model_bytes)} of weights and {_gib(needs.cache_bytes)} of cache take a GPU of "
            f"{_gib(needs.memory_bytes)} with {HEADROOM:.0%} left free, and {gpu.name} has {_gib(gpu.memory_bytes)}"
        )
    return found


def check(client: docker.DockerClient, image: str, devices: Sequence[str]) -> None:
    """Refuse an image that the GPUs ``devices`` (index or UUID) can't run; an image that asks for none is let through.

    An image that needs a driver on a host without one is refused only where GPUs were asked for: without one it may
    run where the driver is not seen from here (a remote engine).

    Raises:
        GpuError: naming each thing that is asked for, and what there is.
    """
    try:
        labels = client.images.get(image).labels or {}
    except docker.errors.DockerException:
        return  # that it isn't there says whoever starts it
    needs = needs_of(labels)
    if needs.driver is None:
        return
    here = gpus()
    wrong = []
    for device in devices:
        found = next((each for each in here if device in {each.uuid, str(each.index)}), None)
        if found is None:
            asked = f"{needs.runtime} needs NVIDIA driver {needs.driver} or later"
            raise GpuError(f"{asked}, and NVML knows no GPU `{device}`")
        wrong += problems(needs.of_one_among(len(devices)), found)
    if wrong:
        raise GpuError("; ".join(dict.fromkeys(wrong)))


def _runs(kernels: str, capability: tuple[int, int]) -> bool:
    """Whether code for one architecture runs on a GPU: of the same major version, no newer (CUDA's binary promise)."""
    major, minor = _version(kernels)[:2]
    return capability[0] == major and capability[1] >= minor


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
