"""What the quantizers' workers share: seeds, and the type that weights are stored in."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipway_worker import WorkerError

if TYPE_CHECKING:
    from pipeline.quantization.mixture import SensitivityRequest
    from pipeline.quantization.quantize import QuantizationRequest

_NUMBERED = re.compile(r"(^|\.)\d+\.")


def prepare(request: QuantizationRequest | SensitivityRequest) -> str:
    """Seed everything, ask for deterministic algorithms, and return the device: ``cuda`` or ``cpu``."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    let_threads_sleep()
    import torch

    torch.manual_seed(request["seed"])
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    return "cuda" if torch.cuda.is_available() else "cpu"


def let_threads_sleep() -> None:
    """Have OpenMP's threads sleep while they wait; call it before torch is imported.

    They spin otherwise: on busy processors that took 2.5 to 10 times the processor time.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def batch_size(blocks: list[list[int]]) -> int:
    """How many blocks go through a layer at once: about 8,192 tokens, so that attention's memory stays bounded.

    Blocks of unlike length go alone: together they would be padded.
    """
    lengths = {len(block) for block in blocks}
    return max(1, 8192 // max(lengths)) if len(lengths) == 1 else 1


def store_as_float16(folder: Path, source: Path) -> None:
    """Rewrite a checkpoint's other floating-point tensors as float16, file by file, and the index's total size.

    On CPU the search runs in float32 or bfloat16, for which processors are made; float16 is what kernels load. What
    stands outside the numbered layers is taken from the ``source``: as bfloat16 it would have lost three bits.

    Raises:
        WorkerError: a weight is too large for float16.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    total, originals = 0, _outside_layers(source)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in sorted(stored.keys())}
            metadata = stored.metadata()
        for name, tensor in tensors.items():
            if tensor.dtype in {torch.float32, torch.bfloat16}:
                tensors[name] = originals.get(name, tensor).half()
                if not tensors[name].isfinite().all():
                    raise WorkerError(f"`{name}` holds values that float16 can't: this model can't be quantized on CPU")
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        save_file(tensors, path, metadata=metadata)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        document = json.loads(index.read_text())
        document["metadata"]["total_size"] = total
        index.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def _outside_layers(source: Path) -> dict[str, Any]:
    """The source's tensors that stand in no numbered layer: embeddings, the head, the last norm."""
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stored:
            found |= {name: stored.get_tensor(name) for name in sorted(stored.keys()) if not _NUMBERED.search(name)}
    return found
