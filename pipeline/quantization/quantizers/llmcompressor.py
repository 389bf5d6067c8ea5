"""Worker: what needs calibration, by llm-compressor 0.14: GPTQ to INT8 or 4 bits, NVFP4, and scales of an FP8 cache."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from calibration_blocks import calibration_blocks  # type: ignore[import-not-found]
from compressed_tensors_config import cache_scheme, quantization_config  # type: ignore[import-not-found]
from finished_layers import FinishedLayers  # type: ignore[import-not-found]
from quantizer_common import batch_size, prepare  # type: ignore[import-not-found]
from slipway_worker import Report, WorkerError, main

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from pipeline.quantization.quantize import QuantizationRequest

# Of arXiv:2211.10438: how much of the inputs' range moves into the weights; llm-compressor's examples have 0.8 too.
_SMOOTHING = 0.8
_PRESETS = {"fp8": "FP8_DYNAMIC", "fp8-block": "FP8_BLOCK", "w8a8": "W8A8", "nvfp4": "NVFP4", "mxfp4": "MXFP4"}


def work(request: QuantizationRequest, report: Report) -> dict[str, object]:
    """Quantize ``source`` into the folder ``output``; see `QuantizationRequest` in `pipeline.quantization.quantize`."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    device = prepare(request)
    calibration = calibration_blocks(request, report)
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
        for block in calibration.blocks
    ]
    finished = FinishedLayers(request, device, model.config.get_text_config().num_hidden_layers, report)
    try:
        oneshot(
            model=model,
            recipe=[*_recipe(request, finished), _layer_done(finished)],
            dataset=DataLoader(samples, batch_size=batch_size(calibration.blocks)),
            pipeline="sequential",
        )
    except (ValueError, NotImplementedError) as error:
        raise WorkerError(f"llm-compressor can't quantize this model as asked: {error}") from error
    report("saving")
    model.save_pretrained(request["output"], save_compressed=True)
    return {"device": device, "calibration": calibration.used, "quantization_config": quantization_config(request)}


def _recipe(request: QuantizationRequest, finished: FinishedLayers) -> list[Any]:
    """llm-compressor's modifiers for a method."""
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    common = {"ignore": request["ignored"], "kv_cache_scheme": cache_scheme() if request["kv_cache"] else None}
    method = request["method"]
    if method in {"w4a16", "mixed"}:
        groups = quantization_config(request)["config_groups"]
        kept = ("targets", "weights", "input_activations")
        return [
            _gptq(finished)(
                config_groups={name: {key: group[key] for key in kept} for name, group in groups.items()}, **common
            )
        ]
    if method == "w8a8":
        smoothing = SmoothQuantModifier(smoothing_strength=_SMOOTHING)
        return [smoothing, _gptq(finished)(targets="Linear", scheme=_PRESETS[method], **common)]
    return [QuantizationModifier(targets="Linear", scheme=_PRESETS[method], **common)]


def _gptq(finished: FinishedLayers) -> Any:  # noqa: ANN401 - a class of a library without types
    """llm-compressor's GPTQ, which takes a layer's weights and scales from ``finished`` where they are there.

    The scales of NVFP4 and of an FP8 cache are statistics of the forward passes alone: there is nothing to keep.
    """
    import torch
    from compressed_tensors.offload import update_offload_parameter
    from llmcompressor.modifiers.gptq import GPTQModifier

    class GPTQ(GPTQModifier):  # type: ignore[misc]
        def calibrate_module(self, module: Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if finished.is_finished:
                self._num_samples[module] = torch.ones(())  # those that have one are quantized
            else:
                super().calibrate_module(module, args, output)

        def compress_module_list(self, module_list: list[Module]) -> None:
            if not finished.is_finished:
                super().compress_module_list(module_list)
            for module in module_list:
                self._num_samples.pop(module, None)
                parameters = dict(module.named_parameters(recurse=False))
                found = finished.kept(self._module_names[module], lambda tensors=parameters: tuple(tensors.values()))
                for name, tensor in zip(parameters, found, strict=True):
                    update_offload_parameter(module, name, tensor)

    return GPTQ


def _layer_done(finished: FinishedLayers) -> Any:  # noqa: ANN401 - a class of a library without types
    """A modifier that changes nothing and goes on to the next layer."""
    from llmcompressor.modifiers import Modifier

    class LayerDone(Modifier):  # type: ignore[misc]
        def on_initialize(self, state: object, **_: object) -> bool:  # noqa: ARG002 - llm-compressor's interface
            return True

        def on_sequential_epoch_end(self, state: object, event: object, **_: object) -> None:  # noqa: ARG002
            finished.next()

    return LayerDone()


if __name__ == "__main__":
    main(work)
