"""The parts of a GPU run: each works in a process of its own and returns what it found, or raises.

They drive Slipway's own modules: its gate, its GPU pool, its NVML sampler, its quantizers' workers and its checks of
what these write.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from benchmarks.gpu.document import Found, Gate, GpuRun, Inference, Machine, Memory, Quantized, Requirement
from benchmarks.gpu.unpack import FOLDER
from containers.hardware import gpu as hardware
from containers.hardware import gpu_pool
from containers.hardware.gpu import Gpu
from containers.hardware.gpu_models import GpuDataError, find_gpu
from containers.image import gpu_compatibility, profile
from containers.image.gpu_compatibility import Needs
from containers.sandbox.memory import MemorySampler, gpu_readers
from pipeline.compatibility.scheme import Scheme
from pipeline.errors import WorkerFailed
from pipeline.quantization.quantize import backend_of, quantize
from pipeline.settings import Settings
from pipeline.workers.environments import environment_folder, install_harness
from pipeline.workers.runner import Workers
from registry.digests import digest_file

MODELS = Path(__file__).resolve().parents[2] / "models" / "demo"
EVALUATOR = Path(__file__).resolve().parents[2] / "evals" / "drift"
# The carried sets that an environment has, by precedence.
ENVIRONMENTS = {"autogptq": ("old", "new"), "autoawq": ("old", "new"), "gptqmodel": ("new",), "llmcompressor": ("new",)}
SAMPLES, TOKENS = 32, 200
# A GPU with a tenth of its memory in use counts as used by others, also where its processes can't be seen.
HELD_SHARE = 0.15
# A CUDA context takes some hundred MB beside what a program allocates.
CONTEXT_BYTES = 2 << 30
# How far a library's own kernels, in 16 bits and with quantized inputs, may be from exact arithmetic.
MOST_NATS = 0.05

SCHEMES: Mapping[str, Mapping[str, object]] = {
    "gptq by autogptq": {"method": "gptq", "backend": "autogptq", "group_size": 64},
    "awq by autoawq": {"method": "awq", "backend": "autoawq", "group_size": 64},
    "gptq by gptqmodel": {"method": "gptq", "backend": "gptqmodel", "group_size": 64},
    "awq by gptqmodel": {"method": "awq", "backend": "gptqmodel", "group_size": 64},
    "w4a16 by llmcompressor": {"method": "w4a16", "backend": "llmcompressor", "group_size": 64},
    "w8a8 by llmcompressor": {"method": "w8a8", "backend": "llmcompressor"},
    "nvfp4 by llmcompressor": {"method": "nvfp4", "backend": "llmcompressor"},
}


class PartSkipped(Exception):
    """A part can't run here; the message says what it lacks."""


class PartFailed(Exception):
    """A part found something other than it should; ``found`` is kept beside the message."""

    def __init__(self, message: str, found: Found | None = None) -> None:
        super().__init__(message)
        self.found = found


@dataclass(frozen=True)
class Context:
    """The run: its settings, its document so far, whether it is a dry run."""

    settings: Settings
    run: GpuRun
    dry_run: bool

    @property
    def device(self) -> str:
        """Where quantizers must have worked."""
        return "cpu" if self.dry_run else "cuda"

    def folder(self, scheme: str) -> Path:
        """The folder of a scheme's checkpoint."""
        return self.settings.home / "checkpoints" / scheme.replace(" ", "-")

    def found(self, part: str) -> Found | None:
        """What an earlier part found."""
        return next((each.found for each in self.run.parts if each.part == part), None)


Work = Callable[[Context], Found | None]


def machine(context: Context) -> Machine:
    """Describe the machine twice: as torch sees it, and as NVML does.

    Raises:
        PartFailed: the two disagree, or there is no GPU and this is no dry run.
    """
    import torch

    there = torch.cuda.is_available()
    found = next(iter(hardware.gpus()), None)
    described = Machine(
        python=sys.version.split()[0],
        cpus=len(os.sched_getaffinity(0)),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        torch_device=torch.cuda.get_device_name() if there else None,
        torch_capability=torch.cuda.get_device_capability() if there else None,
        nvml_device=found and found.name,
        nvml_capability=found and found.capability,
        driver=found and found.driver,
        driver_cuda=found and found.cuda,
        memory_bytes=found and found.memory_bytes,
        known_as=found and _known(found),
    )
    if described.torch_capability != described.nvml_capability:
        raise PartFailed("torch and NVML name different compute capabilities", described)
    if not (there or context.dry_run):
        raise PartFailed("torch sees no GPU: `--dry-run` is for a machine without one", described)
    return described


def environments(context: Context) -> None:
    """Make the workers' environments under the names that Slipway looks for: carried wheels, then this Python's own."""
    for name, carried in ENVIRONMENTS.items():
        sites = [FOLDER / "site" / each for each in carried]
        folder = environment_folder(name, context.settings.home)
        venv.create(folder, clear=True, symlinks=True, with_pip=False)
        (packages,) = folder.glob("lib/python*/site-packages")
        here = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
        (packages / "carried.pth").write_text("\n".join(map(str, [*sites, *here])) + "\n")
        install_harness(name, packages)


def gate(context: Context) -> Gate:
    """Ask the gate about every runtime and about what this machine can't be, and the pool for the GPU twice.

    Raises:
        PartSkipped: NVML finds no GPU.
        PartFailed: a made-up requirement passed, or the GPU was given away twice.
    """
    found = _gpu()
    runtimes = [(name, gpu_compatibility.labels_of(profile.load(name))) for name in profile.names()]
    made_up: list[tuple[str, Needs]] = [
        ("a driver that is one newer", Needs("made up", driver=_newer(found.driver))),
        ("kernels of the next architecture alone", Needs("made up", capabilities=(f"{found.capability[0] + 1}.0",))),
        ("weights as large as the GPU's memory", Needs("made up", model_bytes=found.memory_bytes)),
    ]
    if found.cuda is not None:
        made_up.append(("the next CUDA", Needs("made up", cuda=f"{found.cuda[0] + 1}.0")))
    answers = [
        Requirement(
            image=name,
            expected="accepted" if not labels else None,
            problems=tuple(gpu_compatibility.problems(gpu_compatibility.needs_of(labels), found)),
        )
        for name, labels in runtimes
    ]
    answers += [
        Requirement(image=name, expected="refused", problems=tuple(gpu_compatibility.problems(needs, found)))
        for name, needs in made_up
    ]
    answered = Gate(requirements=tuple(answers), second_reservation=_second_reservation(context.settings.locks))
    wrong = [each.image for each in answers if each.expected and (each.expected == "refused") != bool(each.problems)]
    if wrong or answered.second_reservation is None:
        raise PartFailed(f"wrong answers: {', '.join(wrong) or 'the GPU was reserved twice'}", answered)
    return answered


def memory(_: Context) -> Memory:
    """Sample the GPU's memory while another process holds a share of it.

    Raises:
        PartSkipped: NVML finds no GPU.
        PartFailed: the samples do not show it.
    """
    found = _gpu()
    size = int(HELD_SHARE * found.memory_bytes)
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(size, held, done), daemon=True)
    pids: set[int] = set()
    busy = {"before": hardware.is_busy(found)}
    readers = gpu_readers([found.uuid], lambda: pids)
    sampler = MemorySampler(lambda: dict(readers[0]()), "nvml", phase="before")
    sampler.start()
    time.sleep(1)
    sampler.phase = "starting"
    process.start()
    pids.add(process.pid or 0)
    if not held.wait(30):
        raise PartFailed("the process that was to hold memory did not get it in 30 s")
    sampler.phase = "held"
    time.sleep(2)
    busy["held"] = hardware.is_busy(found)
    sampler.phase = "ending"
    done.set()
    process.join()
    sampler.phase = "after"
    time.sleep(1)
    sampler.stop()
    busy["after"] = hardware.is_busy(found)
    sampled = Memory(
        held_bytes=size,
        peaks=sampler.peaks_by_phase("gpu_0_memory_bytes"),
        process_bytes=sampler.peak("gpu_0_process_bytes"),
        samples_per_s=sampler.hertz(),
        busy=busy,
    )
    more = sampled.peaks["held"] - sampled.peaks["before"]
    if not size <= more <= size + CONTEXT_BYTES:
        raise PartFailed(f"{size} bytes were held, and NVML showed {more} more", sampled)
    if busy != {"before": False, "held": True, "after": False}:
        raise PartFailed(f"whether the GPU is used by others was wrong: {busy}", sampled)
    return sampled


def quantized(context: Context, scheme: str) -> Quantized:
    """Quantize the demo as a release does, and check the checkpoint.

    Raises:
        PartSkipped: the backend needs a GPU, and this is a dry run.
        PartFailed: it was not done on the device that this run is for.
    """
    folder = context.folder(scheme)
    shutil.rmtree(folder, ignore_errors=True)
    output, scratch = folder / "checkpoint", folder / "scratch"
    for each in (output, scratch):
        each.mkdir(parents=True)
    with _skipped_without_gpu(context):
        record = quantize(
            MODELS / "model",
            MODELS / "calibration.jsonl",
            SAMPLES,
            TOKENS,
            Scheme.model_validate(SCHEMES[scheme]),
            output,
            Workers(context.settings, _progress),
            scratch,
            _progress,
        )
    shutil.rmtree(scratch)
    found = Quantized(record=record, sha256=digest_file(output / "model.safetensors"))
    if record.device != context.device:
        raise PartFailed(f"it was quantized on {record.device}", found)
    return found


def quantized_again(context: Context, scheme: str) -> Quantized:
    """Quantize the demo once more, and compare the bytes.

    Raises:
        PartSkipped: the first time failed.
        PartFailed: the bytes differ.
    """
    before = context.found(scheme)
    if not isinstance(before, Quantized):
        raise PartSkipped("the first time gave no checkpoint")
    found = quantized(context, scheme)
    found = found.model_copy(update={"same_as_before": found.sha256 == before.sha256})
    if not found.same_as_before:
        raise PartFailed("the same request gave other bytes", found)
    return found


def inference(context: Context, scheme: str) -> Inference:
    """Load a checkpoint with its own library, and compare its loss with that of the unpacked weights.

    Raises:
        PartSkipped: there is no checkpoint, or the library needs a GPU, and this is a dry run.
        PartFailed: it ran on another device, or its loss differs.
    """
    if context.found(scheme) is None:
        raise PartSkipped("it was not quantized")
    backend = backend_of(Scheme.model_validate(SCHEMES[scheme])).environment
    with _skipped_without_gpu(context):
        answered = _infer(context, scheme, backend, backend)
    unpacked = _infer(context, scheme, "llmcompressor", "unpacked")["loss"]
    found = Inference(**answered, unpacked_loss=unpacked)
    if found.device != context.device:
        raise PartFailed(f"it ran on {found.device}", found)
    if not abs(found.loss - unpacked) <= MOST_NATS:
        raise PartFailed(f"the loss is {found.loss:.4f}, and {unpacked:.4f} of the unpacked weights", found)
    return found


def left_out(reason: str) -> Work:
    """A part that never runs, so that the document says why."""

    def skip(_: Context) -> None:
        raise PartSkipped(reason)

    return skip


@dataclass(frozen=True)
class Planned:
    """A part's work and its time limit in seconds; in a dry run, on a CPU, it has ten times as long."""

    work: Work
    limit: int


PARTS: Mapping[str, Planned] = {
    "machine": Planned(machine, 30),
    "environments": Planned(environments, 30),
    "gate": Planned(gate, 20),
    "memory": Planned(memory, 40),
    **{scheme: Planned(partial(quantized, scheme=scheme), 90) for scheme in SCHEMES},
    **{f"kernels of {scheme}": Planned(partial(inference, scheme=scheme), 60) for scheme in SCHEMES},
    **{f"{scheme}, again": Planned(partial(quantized_again, scheme=scheme), 60) for scheme in SCHEMES},
    "vllm": Planned(left_out("its wheel with CUDA kernels is larger than all that may be carried"), 5),
    "compiled kernels": Planned(
        left_out("Marlin, Machete, ExLlama and AutoGPTQ's CUDA kernels are compiled by nvcc for longer than a run"), 5
    ),
}


def _hold(size: int, held: Event, done: Event) -> None:
    """Allocate so many bytes of the GPU's memory, and keep them until ``done``."""
    import torch

    kept = torch.ones(size, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    held.set()
    done.wait()
    del kept


@contextmanager
def _skipped_without_gpu(context: Context) -> Iterator[None]:
    """In a dry run, skip a part whose worker says that it needs a GPU."""
    try:
        yield
    except WorkerFailed as error:
        if context.dry_run and "GPU" in str(error).splitlines()[0]:
            raise PartSkipped(str(error)) from error
        raise


def _infer(context: Context, scheme: str, environment: str, loader: str) -> dict[str, Any]:
    scratch = context.folder(scheme) / f"inference-{loader}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    request = {
        "loader": loader,
        "checkpoint": str(context.folder(scheme) / "checkpoint"),
        "model": str(MODELS / "model"),
        "text": str(MODELS / "heldout.jsonl"),
        "drift": str(EVALUATOR),
    }
    script = Path(__file__).with_name("inference.py")
    return Workers(context.settings, _progress)(environment, script, request, scratch)


def _gpu() -> Gpu:
    found = next(iter(hardware.gpus()), None)
    if found is None:
        raise PartSkipped("NVML finds no GPU")
    return found


def _known(found: Gpu) -> str | None:
    try:
        return find_gpu(found.name).name
    except GpuDataError:
        return None


def _newer(driver: str) -> str:
    first, *rest = driver.split(".")
    return ".".join([str(int(first) + 1), *rest])


def _second_reservation(locks: Path) -> str | None:
    with gpu_pool.reserved(1, _progress, locks, wait=False):
        try:
            with gpu_pool.reserved(1, _progress, locks, wait=False):
                return None
        except gpu_pool.GpuPoolError as error:
            return str(error)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
