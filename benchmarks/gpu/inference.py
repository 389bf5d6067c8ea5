"""Worker: load a checkpoint with the library that wrote it, and say which kernels compute it and with what loss.

In llm-compressor's environment `loader: unpacked` gives the loss of the weights as `evals/drift` unpacks them.
"""

from __future__ import annotations

import collections
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipway_worker import Report, WorkerError, main

if TYPE_CHECKING:
    import torch

BLOCKS, LENGTH, MOST_KERNELS = 16, 256, 12


def work(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Return the keys of `Inference` in `document.py` beside this script, without ``unpacked_loss``."""
    import torch

    folder = Path(request["checkpoint"])
    device = "cuda" if torch.cuda.is_available() and request["loader"] != "unpacked" else "cpu"
    report(f"loading {folder} on {device} by {request['loader']}")
    model = LOADERS[request["loader"]](folder, device, request)
    blocks = _blocks(request).to(device)
    with torch.no_grad():
        for _ in range(2):  # what is compiled is compiled here, some of it on the second call
            _loss(model, blocks[:1])
        kernels = _profile(model, blocks[:1], device)
        loss = sum(_loss(model, block[None]) for block in blocks) / len(blocks)
    layers = collections.Counter(
        type(module).__name__
        for name, module in model.named_modules()
        if name.endswith("_proj") and not list(module.children())
    )
    return {"device": device, "layers": layers, "kernels": kernels, "loss": loss}


def _loss(model: Callable[..., Any], blocks: torch.Tensor) -> float:
    """Nats a token."""
    import torch

    logits = model(input_ids=blocks).logits[:, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()))


def _profile(model: Callable[..., Any], blocks: torch.Tensor, device: str) -> list[dict[str, Any]]:
    """The kernels of one forward pass, those that took most time first."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        _loss(model, blocks)
    own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, own))[:MOST_KERNELS]
    return [{"name": each.key[:200], "calls": each.count, "microseconds": getattr(each, own)} for each in events]


def _blocks(request: Mapping[str, Any]) -> torch.Tensor:
    """Held-out text, [blocks, tokens]."""
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(request["model"]) / "tokenizer.json"))
    tokens: list[int] = []
    for line in Path(request["text"]).read_text().splitlines():
        tokens += tokenizer.encode(json.loads(line)["text"]).ids[:LENGTH]
        if len(tokens) >= BLOCKS * LENGTH:
            break
    return torch.tensor(tokens[: BLOCKS * LENGTH]).view(BLOCKS, LENGTH)


def _autoawq(folder: Path, device: str, _: Mapping[str, Any]) -> Any:  # noqa: ANN401 - a class without types
    if device == "cpu":
        raise WorkerError("AutoAWQ's kernels are Triton's, which needs a GPU")
    from awq import AutoAWQForCausalLM

    return AutoAWQForCausalLM.from_quantized(str(folder), fuse_layers=False, device_map={"": "cuda:0"}).model


def _autogptq(folder: Path, _device: str, _: Mapping[str, Any]) -> Any:  # noqa: ANN401 - as above
    from auto_gptq import AutoGPTQForCausalLM

    # Its own CUDA kernels are not carried; without them it unpacks with torch.
    return AutoGPTQForCausalLM.from_quantized(
        str(folder), device="cuda:0", use_safetensors=True, disable_exllama=True, disable_exllamav2=True
    ).model


def _gptqmodel(folder: Path, device: str, _: Mapping[str, Any]) -> Any:  # noqa: ANN401 - as above
    from gptqmodel import BACKEND, GPTQModel

    # The faster ones are compiled by nvcc on first use, for longer than a run takes.
    awq = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
    names = ("AWQ_GEMM_TRITON", "AWQ_TORCH") if awq else ("GPTQ_TRITON", "GPTQ_TORCH")
    backend = BACKEND[names[device == "cpu"]]
    return GPTQModel.load(str(folder), device=f"{device}:0" if device == "cuda" else device, backend=backend).model


def _llmcompressor(folder: Path, device: str, _: Mapping[str, Any]) -> Any:  # noqa: ANN401 - as above
    import torch
    from transformers import AutoModelForCausalLM

    # NVFP4 is unpacked to bfloat16 whatever the model's dtype.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    return model.to(device).eval()


def _unpacked(folder: Path, _: str, request: Mapping[str, Any]) -> Any:  # noqa: ANN401 - as above
    sys.path.insert(0, str(request["drift"]))
    from checkpoints import read  # type: ignore[import-not-found]

    return read(folder).float().eval()


LOADERS: Mapping[str, Callable[[Path, str, Mapping[str, Any]], Any]] = {
    "autoawq": _autoawq,
    "autogptq": _autogptq,
    "gptqmodel": _gptqmodel,
    "llmcompressor": _llmcompressor,
    "unpacked": _unpacked,
}


if __name__ == "__main__":
    main(work)
