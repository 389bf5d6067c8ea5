"""Keeps a quantizer's results for each finished layer in the worker's folder until the whole model is done.

The law: a layer's results follow from its weights and its inputs, and its inputs from the layers before. So a run that
reads the results of finished layers from files, and computes the layers' inputs anew, writes the same bytes as a run
that was never interrupted. It skips the searches and Hessians, not the forward passes.
Files are used only for the same request, device, library and arithmetic, and only if they are complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipway_counting import Count
from slipway_worker import Report

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.quantization.quantize import QuantizationRequest

# The folder below the worker's own that stays when the worker is killed: `pipeline.store.artifacts.FINISHED`.
_FOLDER = "finished"
_MADE_WITH = "made_with.json"
_DIGEST_BYTES = hashlib.sha256().digest_size


class FinishedLayers:
    """Keeps a model's layers in their order: `kept` for each result within a layer, then `next`, which saves the layer.

    Each layer is one file: the sha256 of the rest, and the tensors as safetensors. Each finished layer is reported.
    """

    def __init__(self, request: QuantizationRequest, device: str, layers: int, report: Report) -> None:
        """Begin with the first layer; ``layers`` is how many there are."""
        self._folder = finished_folder(request, device, report)
        self._layers, self._report = layers, report
        self._whole = {number for number in range(layers) if self._read(number) is not None}
        self._seconds = 0.0  # of the layers that this run has quantized
        self._begin(0)
        if self._whole:
            report(f"{len(self._whole)} of {layers} layers were finished before a run was cut off: they are taken over")

    @property
    def is_finished(self) -> bool:
        """Whether the current layer is taken over from an earlier run."""
        return self._layer in self._whole

    def kept(self, key: str, find: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Return what an earlier run found in the current layer under a key of its own; otherwise find and keep it."""
        if self.is_finished:
            count = sum(name.rpartition(" ")[0] == key for name in self._found)
            return tuple(self._found[f"{key} {number}"] for number in range(count))
        found = find()
        # Copied, as a library may go on to work on them.
        self._found |= {f"{key} {at}": tensor.detach().to("cpu", copy=True) for at, tensor in enumerate(found)}
        return found

    def next(self) -> None:
        """Save the current layer, report it, and go on to the next."""
        if not self.is_finished:
            if self._found:
                self._write()
            self._seconds += time.monotonic() - self._began
        self._begin(self._layer + 1)
        if self._layer <= self._layers:
            before = len([number for number in self._whole if number < self._layer])
            count = Count("quantized", self._layer, self._layers, "layers", self._seconds, before, peak_memory())
            self._report(str(count))

    def _begin(self, layer: int) -> None:
        self._layer, self._began = layer, time.monotonic()
        self._found: dict[str, Tensor] = (self._read(layer) or {}) if self.is_finished else {}

    def _path(self, layer: int) -> Path:
        return self._folder / f"layer-{layer:05}"

    def _read(self, layer: int) -> dict[str, Tensor] | None:
        from safetensors.torch import load

        try:
            content = self._path(layer).read_bytes()
        except FileNotFoundError:
            return None
        digest, tensors = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(tensors).digest() != digest:
            self._report(f"what was kept of layer {layer + 1} is damaged: it is quantized again")
            return None
        return dict(load(tensors))

    def _write(self) -> None:
        from safetensors.torch import save

        tensors = save({name: tensor.contiguous() for name, tensor in self._found.items()})
        with whole_file(self._path(self._layer)) as path:
            path.write_bytes(hashlib.sha256(tensors).digest() + tensors)


def finished_folder(request: QuantizationRequest, device: str, report: Report) -> Path:
    """The folder of what earlier runs have finished; emptied if they had another request, device or arithmetic."""
    folder = Path.cwd() / _FOLDER
    folder.mkdir(exist_ok=True)
    made_with = _made_with(request, device)
    before: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        before = json.loads((folder / _MADE_WITH).read_text())
    if before == made_with:
        if len(list(folder.iterdir())) == 1:
            report("starting from the beginning: an earlier run has left nothing finished")
        return folder
    if before:
        changed = ", ".join(name for name, value in made_with.items() if before.get(name) != value)
        report(f"starting from the beginning: what an earlier run has finished was made with another {changed}")
    shutil.rmtree(folder)
    folder.mkdir()
    with whole_file(folder / _MADE_WITH) as path:
        path.write_text(json.dumps(made_with))
    return folder


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path to write to; the file is synced to disk and renamed to ``path`` if the block ends well."""
    part = path.with_name(f"{path.name}.part")
    yield part
    _sync(part)
    part.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _made_with(request: QuantizationRequest, device: str) -> dict[str, object]:
    """What must be the same for the same bytes. Slipway's artifact key covers the files and the pinned packages too."""
    import torch

    return {
        "request": hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "torch": torch.__version__,
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "number of threads": torch.get_num_threads(),
    }


def peak_memory() -> str:
    """The most memory that this process has had, from Linux; with CUDA, also what torch has had of the GPU's."""
    import torch

    status = Path("/proc/self/status").read_text()
    kilobytes = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)
    on_gpu = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB on the GPU" if torch.cuda.is_initialized() else ""
    return f"peak memory {kilobytes * 1024 / 1e9:.1f} GB{on_gpu}"
