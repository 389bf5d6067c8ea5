"""Worker: GPTQ by AutoGPTQ 0.7.1, on CUDA alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calibration_blocks import calibration_blocks  # type: ignore[import-not-found]
from expert_tokens import ExpertTokens  # type: ignore[import-not-found]
from finished_layers import FinishedLayers  # type: ignore[import-not-found]
from quantizer_common import batch_size, prepare  # type: ignore[import-not-found]
from slipway_worker import Report, WorkerError, main

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from pipeline.quantization.quantize import QuantizationRequest


def work(request: QuantizationRequest, report: Report) -> dict[str, object]:
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
    calibration = calibration_blocks(request, report)
    report("loading AutoGPTQ")
    import logging

    import torch
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
    from auto_gptq.modeling import _base

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
    experts = ExpertTokens(model.model, calibration.tokens)
    finished = FinishedLayers(request, device, model.config.num_hidden_layers, report)
    logging.getLogger("auto_gptq").addHandler(_LayerDone(finished))
    logging.getLogger("auto_gptq").setLevel(logging.INFO)
    _base.GPTQ = resumable(_base.GPTQ, model.model, finished)
    model.quantize(
        [{"input_ids": block, "attention_mask": [1] * len(block)} for block in calibration.blocks],
        batch_size=batch_size(calibration.blocks),
        cache_examples_on_gpu=False,
    )
    finished.next()
    report("saving")
    model.save_quantized(request["output"], use_safetensors=True)
    kept = ("bits", "group_size", "damp_percent", "desc_act", "static_groups", "sym", "true_sequential", "quant_method")
    document = config.to_dict()
    return {
        "device": device,
        "calibration": calibration.used,
        "quantization_config": {**{key: document[key] for key in kept}, "checkpoint_format": "gptq"},
        "experts": experts.found(),
    }


def resumable(gptq: type, model: Module, finished: FinishedLayers) -> type:
    """AutoGPTQ's class for one linear layer of ``model``; it needs no Hessian for a layer that is finished."""
    names = {module: name for name, module in model.named_modules()}

    class Resumable(gptq):  # type: ignore[misc]
        def add_batch(self, inp: Tensor, out: Tensor) -> None:
            if not finished.is_finished:
                super().add_batch(inp, out)

        def fasterquant(self, **settings: object) -> tuple[Tensor, ...]:
            def find() -> tuple[Tensor, ...]:
                return (*super(Resumable, self).fasterquant(**settings), self.layer.weight.data)

            *found, weight = finished.kept(names[self.layer], find)
            self.layer.weight.data = weight.to(self.dev)
            return tuple(tensor.to(self.dev) for tensor in found)

    return Resumable


def _LayerDone(finished: FinishedLayers) -> Any:  # noqa: ANN401, N802 - a logging.Handler, made where logging is imported
    """Turn AutoGPTQ's own lines (``Start quantizing layer 2/32``) into the end of the layer before."""
    import logging

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = record.getMessage()
            if line.startswith("Start quantizing layer ") and " 1/" not in line:
                finished.next()

    return Handler()


if __name__ == "__main__":
    main(work)
