"""Worker: GPTQ by AutoGPTQ 0.7.1, on CUDA alone."""

from __future__ import annotations

from typing import Any

from expert_tokens import ExpertTokens  # type: ignore[import-not-found]
from quantizer_common import batch_size, calibration_blocks, prepare  # type: ignore[import-not-found]
from slipway_worker import Report, WorkerError, main


def work(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Quantize ``source`` into the folder ``output``; see `QuantizationRequest` in `pipeline.quantization.quantize`.

    Raises:
        WorkerError: there is no GPU.
    """
    device = prepare(request)
    if device != "cuda":
        raise WorkerError(
            "AutoGPTQ quantizes on an NVIDIA GPU only, and there is none here: use `backend: gptqmodel`, "
            "which writes the same GPTQ format on CPU"
        )
    blocks = calibration_blocks(request)
    report("loading AutoGPTQ")
    import logging

    import torch
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    config = BaseQuantizeConfig(
        bits=request["bits"],
        group_size=request["group_size"],
        sym=request["symmetric"],
        desc_act=request["desc_act"],
        model_file_base_name="model",
    )
    model = AutoGPTQForCausalLM.from_pretrained(
        request["source"], config, torch_dtype=torch.float16, trust_remote_code=False
    )
    experts = ExpertTokens(model.model, len(blocks) * request["max_tokens"])
    handler = _Forward(report)
    logging.getLogger("auto_gptq").addHandler(handler)
    logging.getLogger("auto_gptq").setLevel(logging.INFO)
    model.quantize(
        [{"input_ids": block, "attention_mask": [1] * len(block)} for block in blocks],
        batch_size=batch_size(request["max_tokens"]),
        cache_examples_on_gpu=False,
    )
    report("saving")
    model.save_quantized(request["output"], use_safetensors=True)
    kept = ("bits", "group_size", "damp_percent", "desc_act", "static_groups", "sym", "true_sequential", "quant_method")
    document = config.to_dict()
    return {
        "device": device,
        "blocks": len(blocks),
        "quantization_config": {**{key: document[key] for key in kept}, "checkpoint_format": "gptq"},
        "experts": experts.found(),
    }


def _Forward(report: Report) -> Any:  # noqa: ANN401, N802 - a logging.Handler, made where logging is imported
    """Turn AutoGPTQ's own lines (``Start quantizing layer 1/32``) into progress."""
    import logging

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = record.getMessage()
            if line.startswith("Start quantizing layer "):
                report("layer " + line.rsplit(" ", 1)[-1].replace("/", " of "))

    return Handler()


if __name__ == "__main__":
    main(work)
