"""Worker: a LoRA or DoRA adapter merged into a model's weights, one at a time, computed in float32 by PEFT.

A file of the result is the source's with other bytes in the place of each merged weight: its header and all else stay
as they are. A file without such a weight is not written.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from slipway_worker import Report, WorkerError, main

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig  # type: ignore[import-not-found]

    from pipeline.sources.merge import MergeRequest

_NAME = "merged"


def work(request: MergeRequest, report: Report) -> dict[str, object]:
    """Merge ``adapter`` into ``source``, and write to the folder ``output``; see `MergeRequest`."""
    import torch
    from peft import LoraConfig
    from safetensors import safe_open

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    source, output, layers = Path(request["source"]), Path(request["output"]), request["layers"]
    configuration = LoraConfig(**request["configuration"], init_lora_weights=False)
    merged = 0
    with safe_open(request["adapter"], "pt") as adapter:
        for name, layer in layers.items():
            _check_rank(name, adapter.get_slice(layer["parts"]["lora_A"]).get_shape()[0], layer["name"], configuration)
        for path in sorted(source.glob("*.safetensors")):
            places = {name: place for name, place in _places(path).items() if name in layers}
            if not places:
                continue
            shutil.copyfile(path, output / path.name)
            with safe_open(path, "pt") as base, (output / path.name).open("r+b") as target:
                for name, place in places.items():
                    parts = {part: adapter.get_tensor(key) for part, key in layers[name]["parts"].items()}
                    weight = _merge(name, base.get_tensor(name), parts, layers[name]["name"], configuration)
                    target.seek(place)
                    target.write(weight.contiguous().view(torch.uint8).numpy().data)
            merged += len(places)
            report(f"{path.name}: {merged} of {len(layers)} layers merged")
    return {"layers": merged}


def _merge(
    name: str, weight: torch.Tensor, parts: dict[str, torch.Tensor], layer: str, configuration: LoraConfig
) -> torch.Tensor:
    """Return one weight [out, in] with its layer's adapter merged, in the weight's own dtype."""
    import torch
    from peft.tuners.lora import Linear  # type: ignore[import-not-found]

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    rank, alpha = _scale(layer, configuration)
    adapted = Linear(linear, _NAME, configuration, r=rank, lora_alpha=alpha)
    for part, tensor in parts.items():
        getattr(adapted, part)[_NAME].weight.data = tensor.float()
    try:
        adapted.merge(safe_merge=True)
    except ValueError as error:  # a number that is not finite
        raise WorkerError(f"`{name}` can't be merged: {error}") from error
    merged = linear.weight.data.to(weight.dtype)
    if not merged.isfinite().all():
        raise WorkerError(f"`{name}` has a number after the merge that {weight.dtype} can't hold")
    return merged


def _check_rank(name: str, rank: int, layer: str, configuration: LoraConfig) -> None:
    expected, _ = _scale(layer, configuration)
    if rank != expected:
        raise WorkerError(f"`{name}`: the adapter has rank {rank}, and its configuration says {expected}")


def _scale(layer: str, configuration: LoraConfig) -> tuple[int, float]:
    """The rank and alpha of a layer, as PEFT finds them."""
    from peft.utils.other import get_pattern_key  # type: ignore[import-not-found]

    ranks, alphas = configuration.rank_pattern, configuration.alpha_pattern
    rank = ranks.get(get_pattern_key(ranks, layer), configuration.r)
    return rank, alphas.get(get_pattern_key(alphas, layer), configuration.lora_alpha)


def _places(path: Path) -> dict[str, int]:
    """Where each tensor of a safetensors file begins, in bytes."""
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}


if __name__ == "__main__":
    main(work)
