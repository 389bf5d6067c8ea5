"""Worker: the loss of a checkpoint on held-out text, its packed weights taken apart here, by the formats' own rules."""

# ruff: noqa: ANN401, PLC0415 - a worker: its libraries are imported inside and have no types here

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slipway_worker import main

# AWQ's kernels read the eight values of an int32 in this order.
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
BLOCKS, LENGTH = 64, 256


def work(request: dict[str, Any], report: Any) -> dict[str, Any]:
    """Return ``{"loss": nats a token}`` over 64 blocks of 256 tokens."""
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(Path(request["model"]) / "tokenizer.json"))
    tokens: list[int] = []
    for line in Path(request["text"]).read_text().splitlines():
        tokens += tokenizer.encode(json.loads(line)["text"]).ids[:LENGTH]
    blocks = torch.tensor(tokens[: BLOCKS * LENGTH]).view(BLOCKS, LENGTH)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(request["model"])).float().eval()
    model.load_state_dict(unpacked(Path(request["checkpoint"])), strict=True)
    total = 0.0
    with torch.no_grad():
        for part in blocks.split(8):
            logits = model(part).logits[:, :-1].flatten(0, 1)
            total += torch.nn.functional.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum").item()
    report(f"{request['checkpoint']}: {total / (BLOCKS * (LENGTH - 1)):.4f} nats a token")
    return {"loss": total / (BLOCKS * (LENGTH - 1))}


def unpacked(folder: Path) -> dict[str, Any]:
    """Every weight of a checkpoint as float32."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    weights = {name: value.float() for name, value in tensors.items() if name.endswith(".weight")}
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        awq = config["quant_method"] == "awq"
        parts = {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")}
        zeros = values(parts["qzeros"], config["bits"], awq=awq)
        if awq:
            weight = values(parts["qweight"], 4, awq=True)
            groups = [index // config["group_size"] for index in range(weight.shape[0])]
        else:
            weight = values(parts["qweight"].T, config["bits"], awq=False).T
            groups = tensors[f"{name}.g_idx"].tolist()
            # The format of GPTQ stores zeros less one.
            zeros = (zeros + 1) % 2 ** config["bits"]
        weights[f"{name}.weight"] = ((weight - zeros[groups]) * parts["scales"].float()[groups]).T.contiguous()
    return weights


def values(packed: Any, bits: int, *, awq: bool) -> Any:
    """Take the int32s of [rows, n] apart into [rows, n · 32 / bits] numbers."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    apart = (packed[:, :, None] >> shifts) & (2**bits - 1)
    return (apart[:, :, AWQ_ORDER] if awq else apart).flatten(1).float()


if __name__ == "__main__":
    main(work)
