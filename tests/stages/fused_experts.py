"""Worker: the experts of a checkpoint in GPT-OSS's format, as transformers itself takes them apart."""

# ruff: noqa: ANN401, PLC0415 - a worker: its libraries are imported inside and have no types here

from __future__ import annotations

from typing import Any

from slipway_worker import main


def work(request: dict[str, Any], report: Any) -> dict[str, Any]:
    """Return ``{"differences": {NAME: …}}``: the largest from what the safetensors file ``expected`` has of each."""
    import numpy as np
    import torch
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM, Mxfp4Config

    torch.set_num_threads(1)
    network = AutoModelForCausalLM.from_pretrained(
        request["checkpoint"], quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    found = network.state_dict()
    report("compared")
    return {
        "differences": {
            name: float(np.abs(found[name].float().numpy() - values).max())
            for name, values in load_file(request["expected"]).items()
        }
    }


if __name__ == "__main__":
    main(work)
