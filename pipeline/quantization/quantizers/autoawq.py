"""Worker: AWQ by AutoAWQ 0.2.9, on CPU or CUDA.

Three things are done beside what the package does; none edits it, all in the subclass of its quantizer that
``quantize(quantizer_cls=…)`` takes:

- On CPU its scale search keeps the weights to restore with ``v.cpu()``, which on CPU is no copy: every try then
  works on what the one before left behind. A state-dict post-hook clones them while a module is searched.
- The clip search multiplies and sums element by element; here the same sums are one batched matrix product.
- What is found for a layer is kept, so that a run that was cut off can continue (`finished_layers`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING

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
    """Quantize ``source`` into the folder ``output``; see `QuantizationRequest` in `pipeline.quantization.quantize`."""
    device = prepare(request)
    calibration = calibration_blocks(request, report)
    # AutoAWQ cuts all that it gets into blocks of one length. A shorter block is filled up with its own beginning.
    blocks = [list(islice(cycle(block), request["max_tokens"])) for block in calibration.blocks]
    report(f"loading AutoAWQ on {device}")
    import torch
    from awq import AutoAWQForCausalLM

    try:
        model = AutoAWQForCausalLM.from_pretrained(
            request["source"],
            # AutoAWQ computes in float16 on CUDA; CPUs have no fast float16, and float32 is more exact.
            torch_dtype=torch.float16 if device == "cuda" else torch.float32,
            trust_remote_code=False,
            safetensors=True,
            device_map=None,
        )
    except TypeError as error:
        raise WorkerError(f"AutoAWQ can't quantize this model: {error}; try `backend: gptqmodel`") from error
    experts = ExpertTokens(model.model, len(blocks) * request["max_tokens"])
    finished = FinishedLayers(request, device, len(model.get_model_layers(model.model)), report)
    model.quantize(
        tokenizer=None,
        quant_config={
            "w_bit": request["bits"],
            "q_group_size": request["group_size"],
            "zero_point": True,
            "version": "GEMM",
        },
        calib_data=blocks,
        max_calib_samples=len(blocks),
        max_calib_seq_len=request["max_tokens"],
        n_parallel_calib_samples=batch_size(blocks),
        quantizer_cls=_quantizer(finished, clone=request["clone_saved_weights"]),
    )
    report("saving")
    model.model.half()
    model.save_quantized(request["output"], safetensors=True)
    return {
        "device": device,
        "calibration": calibration.used,
        "quantization_config": model.quant_config.to_transformers_dict(),
        "experts": experts.found(),
    }


def _quantizer(finished: FinishedLayers, *, clone: bool) -> type:
    """AutoAWQ's quantizer with a quick clip search, what is kept of layers and, when ``clone``, the remedy for CPU."""
    import torch
    from awq.quantize.quantizer import AwqQuantizer

    def clone_values(_module: Module, state: dict[str, Tensor], _prefix: str, _metadata: object) -> None:
        for name, value in state.items():
            state[name] = value.clone()

    class Quantizer(AwqQuantizer):  # type: ignore[misc]
        searches = 0

        def _apply_quant(self, module: Module, named_linears: dict[str, Module]) -> None:
            super()._apply_quant(module, named_linears)
            finished.next()

        def _kept(self, search: Callable[[], Tensor]) -> Tensor:
            """Searches are numbered: a model's run in the same order every time."""
            self.searches += 1
            (found,) = finished.kept(f"search {self.searches}", lambda: (search(),))
            return found

        def _compute_best_scale(
            self, x: Tensor, w_mean: Tensor, x_mean: Tensor, module2inspect: Module, *rest: object
        ) -> Tensor:
            search = partial(super()._compute_best_scale, x, w_mean, x_mean, module2inspect, *rest)
            if not clone:  # then a search leaves other weights behind, so that it can't be left out
                return search()
            hook = module2inspect.register_state_dict_post_hook(clone_values)
            try:
                return self._kept(search)
            finally:
                hook.remove()

        @torch.no_grad()  # type: ignore[untyped-decorator]
        def _compute_best_clip(self, w: Tensor, input_feat: Tensor) -> Tensor:
            return self._kept(lambda: self._search_clip(w, input_feat))

        def _search_clip(
            self, w: Tensor, input_feat: Tensor, n_grid: int = 20, max_shrink: float = 0.5, n_sample_token: int = 512
        ) -> Tensor:
            """Choose each group's clipping value as the package does.

            ``w`` is [out, in], ``input_feat`` [..., in]; returned are the largest values kept, [out, groups, 1].
            """
            group_size = self.group_size if self.group_size > 0 else w.shape[1]
            features = input_feat.reshape(-1, w.shape[1])
            features = features[:: max(1, features.shape[0] // n_sample_token)].to(w.device)
            features = features.reshape(features.shape[0], -1, group_size).transpose(0, 1)  # groups, tokens, group_size
            kept = []
            for part in w.split(256):
                groups = part.reshape(part.shape[0], -1, group_size)  # out, groups, group_size
                largest = groups.abs().amax(dim=-1, keepdim=True)
                expected = torch.bmm(features, groups.permute(1, 2, 0))  # groups, tokens, out
                best, smallest = largest.clone(), torch.full_like(largest, 1e9)
                for step in range(int(max_shrink * n_grid)):
                    limit = largest * (1 - step / n_grid)
                    clipped = torch.clamp(groups, -limit, limit)
                    quantized = self.pseudo_quantize_tensor(clipped.reshape(part.shape))[0].reshape(groups.shape)
                    difference = torch.bmm(features, quantized.permute(1, 2, 0)) - expected
                    error = difference.float().pow(2).mean(dim=1).t().unsqueeze(-1).to(largest.dtype)
                    better = error < smallest
                    smallest[better], best[better] = error[better], limit[better]
                kept.append(best)
            return torch.cat(kept)

    return Quantizer


if __name__ == "__main__":
    main(work)
