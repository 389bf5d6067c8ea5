"""Worker: an adapter with random matrices for a model, made and saved by PEFT."""

from __future__ import annotations

from typing import Any

from slipway_worker import Report, main


def work(request: dict[str, Any], _: Report) -> dict[str, Any]:
    """Wrap ``model`` as ``configuration`` says, and save the adapter into ``output``."""
    import torch  # noqa: PLC0415 - the worker's own
    from peft import LoraConfig, get_peft_model  # type: ignore[import-not-found]  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **request["configuration"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            elif "lora_" in name:
                parameter.copy_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(request["output"])
    return {}


if __name__ == "__main__":
    main(work)
