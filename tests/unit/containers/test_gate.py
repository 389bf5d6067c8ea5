"""The gate before a container starts: what a GPU must have, asked with a fake NVML."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import docker
import pynvml
import pytest

from containers.hardware.gpu import Gpu
from containers.hardware.gpu_models import find_gpu
from containers.image import gpu_compatibility, profile
from containers.image.gpu_compatibility import GpuError, Needs, check, labels_of, needs_of, problems
from containers.sandbox import sandbox

GIB = 2**30


def gpu(driver: str = "580.95.05", name: str = "H100", **changes: Any) -> Gpu:  # noqa: ANN401 - fields of a GPU
    known = find_gpu(name)
    facts = {"index": 0, "uuid": "GPU-1", "name": name, "memory_bytes": known.memory_bytes, "driver": driver,
             "capability": known.capability, "cuda": (13, 0)}  # fmt: skip
    return Gpu(**{**facts, **changes})


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with one H100 and driver 550.54.15."""
    answers = {
        "nvmlInit": None, "nvmlShutdown": None, "nvmlDeviceGetCount": 1, "nvmlDeviceGetHandleByIndex": "handle",
        "nvmlDeviceGetUUID": "GPU-1", "nvmlDeviceGetName": "NVIDIA H100 80GB HBM3",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 * GIB), "nvmlSystemGetDriverVersion": "550.54.15",
        "nvmlDeviceGetCudaComputeCapability": (9, 0), "nvmlSystemGetCudaDriverVersion_v2": 12040,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, lambda *_, answer=answer: answer)


def client(labels: dict[str, str], started: list[str]) -> docker.DockerClient:
    """An engine with one image, that tells what is created."""
    image = SimpleNamespace(labels=labels)
    containers = SimpleNamespace(create=lambda *_, **__: started.append("created"))
    return SimpleNamespace(images=SimpleNamespace(get=lambda _: image), containers=containers)  # type: ignore[return-value]


@pytest.mark.usefixtures("nvml")
def test_driver_580_on_a_host_with_550_is_refused_by_name_and_number_before_a_container_starts(tmp_path: Path) -> None:
    labels = {**labels_of(profile.load("vllm-cuda13")), gpu_compatibility.RUNTIME: "vllm-cuda13"}
    started: list[str] = []
    with (
        pytest.raises(GpuError, match=r"vllm-cuda13 needs NVIDIA driver 580\.65\.06 or later, but this host has 550"),
        sandbox.serve(client(labels, started), "sha256:image", name="x", home=tmp_path, memory_bytes=GIB,
                      gpus=["GPU-1"], progress=print),
    ):  # fmt: skip
        pass
    assert started == []


@pytest.mark.usefixtures("nvml")
def test_cuda_12_runs_where_cuda_13_does_not() -> None:
    labels = {**labels_of(profile.load("vllm-cuda12")), gpu_compatibility.RUNTIME: "vllm-cuda12"}
    check(client(labels, []), "image", ["0"])


@pytest.mark.usefixtures("nvml")
def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(GpuError, match="NVML knows no GPU `7`"):
        check(client(labels_of(profile.load("vllm-cuda13")), []), "image", ["7"])


def test_an_image_for_cpus_asks_for_nothing() -> None:
    assert labels_of(profile.load("vllm-cpu")) == {}
    check(client({}, []), "image", ["0"])


def test_what_is_too_small_is_refused_with_both_numbers() -> None:
    needs = Needs("vllm-cuda13", model_bytes=60 * GIB, cache_bytes=8 * GIB)
    (wrong,) = problems(needs, gpu())
    assert wrong == (
        "60.0 GiB of weights and 8.0 GiB of cache take a GPU of 85.0 GiB with 20% left free, and H100 has 79.6 GiB"
    )
    assert problems(needs, gpu(name="H200")) == []


def test_each_of_two_gpus_holds_half() -> None:
    needs = Needs("vllm-cuda13", model_bytes=60 * GIB, cache_bytes=8 * GIB).of_one_among(2)
    assert problems(needs, gpu()) == []
    assert (needs.model_bytes, needs.cache_bytes) == (30 * GIB, 4 * GIB)


@pytest.mark.parametrize(
    ("driver", "refused"), [("580.65.06", False), ("580.65.05", True), ("580.100.1", False), ("90.0", True)]
)
def test_drivers_are_compared_by_number(driver: str, *, refused: bool) -> None:
    assert bool(problems(Needs("x", driver="580.65.06"), gpu(driver))) == refused


@pytest.mark.parametrize(
    ("kernels", "capability", "runs"),
    [("8.0", (8, 9), True), ("8.9", (8, 0), False), ("9.0", (10, 0), False), ("7.5", (7, 5), True)],
)
def test_kernels_run_on_the_same_generation_or_a_later_one_of_it(
    kernels: str, capability: tuple[int, int], *, runs: bool
) -> None:
    assert (problems(Needs("x", capabilities=(kernels,)), gpu(capability=capability)) == []) == runs


def test_an_older_cuda_is_refused() -> None:
    (wrong,) = problems(Needs("x", cuda="13.0"), gpu(cuda=(12, 4)))
    assert "needs a driver for CUDA 13.0, but this host's driver is for 12.4" in wrong


def test_all_that_is_wrong_is_listed() -> None:
    needs = Needs("x", driver="580.65.06", capabilities=("12.0",), model_bytes=200 * GIB)
    assert len(problems(needs, gpu("550.1"))) == 3


def test_labels_say_what_an_image_needs() -> None:
    labels = {
        gpu_compatibility.DRIVER: "580.65.06",
        gpu_compatibility.CAPABILITIES: "8.0 9.0",
        gpu_compatibility.MODEL_BYTES: "80",
        gpu_compatibility.CACHE_BYTES: "16",
    }
    needs = needs_of(labels)
    assert (needs.driver, needs.capabilities, needs.memory_bytes) == ("580.65.06", ("8.0", "9.0"), 120)
