"""Worker: what needs calibration, by llm-compressor 0.14: GPTQ to INT8 or 4 bits, NVFP4, and scales of an FP8 cache."""

from __future__ import annotations

import os
from typing import Any

from compressed_tensors_config import cache_scheme, quantization_config  # type: ignore[import-not-found]
from quantizer_common import batch_size, calibration_blocks, prepare  # type: ignore[import-not-found]
from slipway_worker import Report, WorkerError, main

# Of arXiv:2211.10438: how much of the inputs' range moves into the weights; llm-compressor's examples have 0.8 too.
_SMOOTHING = 0.8
_PRESETS = {"fp8": "FP8_DYNAMIC", "fp8-block": "FP8_BLOCK", "w8a8": "W8A8", "nvfp4": "NVFP4", "mxfp4": "MXFP4"}


def work(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Quantize ``source`` into the folder ``output``; see `QuantizationRequest` in `pipeline.quantization.quantize`."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    device = prepare(request)
    blocks = calibration_blocks(request)
    report(f"loading llm-compressor on {device}")
    import torch
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    # In the source's dtype: tensors that are not quantized stay as they are, and scales fit the weights.
    model = AutoModelForCausalLM.from_pretrained(
        request["source"], dtype="auto", local_files_only=True, use_safetensors=True
    )
    samples = [
        {"input_ids": torch.tensor(block), "attention_mask": torch.ones(len(block), dtype=torch.long)}
        for block in blocks
    ]
    try:
        oneshot(
            model=model,
            recipe=[*_recipe(request), _progress(report, model.config.get_text_config().num_hidden_layers)],
            dataset=DataLoader(samples, batch_size=batch_size(request["max_tokens"])),
            pipeline="sequential",
        )
    except (ValueError, NotImplementedError) as error:
        raise WorkerError(f"llm-compressor can't quantize this model as asked: {error}") from error
    report("saving")
    model.save_pretrained(request["output"], save_compressed=True)
    return {"device": device, "blocks": len(blocks), "quantization_config": quantization_config(request)}


def _recipe(request: dict[str, Any]) -> list[Any]:
    """llm-compressor's modifiers for a method."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    common = {"ignore": request["ignored"], "kv_cache_scheme": cache_scheme() if request["kv_cache"] else None}
    method = request["method"]
    if method == "w4a16":
        weights = quantization_config(request)["config_groups"]["group_0"]["weights"]
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        return [GPTQModifier(config_groups=groups, **common)]
    if method == "w8a8":
        smoothing = SmoothQuantModifier(smoothing_strength=_SMOOTHING)
        return [smoothing, GPTQModifier(targets="Linear", scheme=_PRESETS[method], **common)]
    return [QuantizationModifier(targets="Linear", scheme=_PRESETS[method], **common)]


def _progress(report: Report, layers: int) -> Any:  # noqa: ANN401 - a class of a library without types
    """A modifier that changes nothing and reports each layer that is done."""
    from llmcompressor.modifiers import Modifier
    from pydantic import PrivateAttr

    class Progress(Modifier):  # type: ignore[misc]
        _done: int = PrivateAttr(default=0)

        def on_initialize(self, state: object, **_: object) -> bool:  # noqa: ARG002 - llm-compressor's interface
            return True

        def on_sequential_epoch_end(self, state: object, event: object, **_: object) -> None:  # noqa: ARG002
            self._done += 1
            if self._done <= layers:
                report(f"layer {self._done} of {layers}")

    return Progress()


if __name__ == "__main__":
    main(work)
