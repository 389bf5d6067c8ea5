"""Worker: GPTQ or AWQ by GPTQModel 7.5.0, on CPU or CUDA."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration_blocks import calibration_blocks  # type: ignore[import-not-found]
from expert_tokens import ExpertTokens  # type: ignore[import-not-found]
from finished_layers import FinishedLayers  # type: ignore[import-not-found]
from quantizer_common import batch_size, prepare, store_as_float16  # type: ignore[import-not-found]
from slipway_worker import Report, WorkerError, main

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.quantization.quantize import QuantizationRequest


def work(request: QuantizationRequest, report: Report) -> dict[str, object]:
    """Quantize ``source`` into the folder ``output``; see `QuantizationRequest` in `pipeline.quantization.quantize`."""
    # Its default is half the processors: slower, for no gain in the result. With one it doesn't start.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, len(os.sched_getaffinity(0)))))
    os.environ["GPTQMODEL_OFFLINE"] = "1"
    # It would compile its packing loop in every run, where the machine has a compiler; no result may depend on that.
    os.environ["GPTQMODEL_DISABLE_PACK_EXT"] = "1"
    device = prepare(request)
    calibration = calibration_blocks(request, report)
    report(f"loading GPTQModel on {device}")
    import torch
    from gptqmodel import BACKEND, GPTQModel

    awq = request["method"] == "awq"
    # On CPU GPTQ computes in float32 (float16 has no fast path there); the AWQ kernel packs 16-bit weights only.
    cpu_dtype = torch.bfloat16 if awq else torch.float32
    config = _config(request, device)
    model = GPTQModel.load(
        request["source"],
        config,
        trust_remote_code=False,
        dtype=torch.float16 if device == "cuda" else cpu_dtype,
    )
    experts = ExpertTokens(model.model, calibration.tokens)
    finished = FinishedLayers(request, device, model.model.config.get_text_config().num_hidden_layers, report)

    def layer_done(layer_idx: int, submodule_finalized: bool) -> None:  # noqa: ARG001 - GPTQModel names them
        if not submodule_finalized:
            finished.next()

    model.layer_callback = layer_done
    _make_resumable(finished)
    backend = (BACKEND.AWQ_TORCH if device == "cpu" else BACKEND.AUTO) if awq else BACKEND.GPTQ_TORCH
    try:
        model.quantize(
            [{"input_ids": block} for block in calibration.blocks],
            batch_size=batch_size(calibration.blocks),
            calibration_sort=None,
            calibration_data_min_length=0,
            backend=backend,
        )
    except (ValueError, NotImplementedError) as error:
        raise WorkerError(f"GPTQModel can't quantize this model as asked: {error}") from error
    report("saving")
    model.save(request["output"])
    store_as_float16(Path(request["output"]), Path(request["source"]))
    return {
        "device": device,
        "calibration": calibration.used,
        "quantization_config": _serialized(model.model.config.quantization_config),
        "experts": experts.found(),
    }


def _config(request: QuantizationRequest, device: str) -> Any:  # noqa: ANN401 - a class of a library without types
    """GPTQModel's configuration for a request."""
    from gptqmodel.quantization import FORMAT, METHOD, QuantizeConfig

    common: dict[str, Any] = {
        "bits": request["bits"],
        "group_size": request["group_size"],
        "device": device,
        # Layers that are done go to disk where a model may be larger than the GPU beside it.
        "offload_to_disk": device == "cuda",
        "offload_to_disk_path": str(Path.cwd() / "offload") if device == "cuda" else None,
    }
    if request["method"] == "awq":
        return QuantizeConfig(**common, method=METHOD.AWQ, format=FORMAT.GEMM, sym=False)
    return QuantizeConfig(
        **common,
        method=METHOD.GPTQ,
        format=FORMAT.GPTQ,
        sym=request["symmetric"],
        desc_act=request["desc_act"],
        # Its order of columns by group, which is the default, needs groups.
        act_group_aware=False if request["desc_act"] or request["group_size"] == -1 else None,
    )


def _make_resumable(finished: FinishedLayers) -> None:
    """Have GPTQModel take what is found for a layer from ``finished``; its own checkpoints know two model types."""
    import torch
    from gptqmodel.looper import awq_processor, gptq_processor

    class GPTQ(gptq_processor.GPTQ):  # type: ignore[misc]
        """Finds one linear layer's weights; needs no Hessian where they are known."""

        def add_batch(self, inp: Tensor, out: Tensor, batch_index: int | None = None) -> None:
            if finished.is_finished:
                self.fwd_counter += 1  # that it was reached
            else:
                super().add_batch(inp, out, batch_index=batch_index)

        def quantize(self, blocksize: int = 128) -> tuple[Any, ...]:
            told: tuple[Any, ...] = (0.0, "known", 0.0, 0)  # for a log: seconds, loss, damping, samples

            def find() -> tuple[Tensor, ...]:
                nonlocal told
                found = super(GPTQ, self).quantize(blocksize)
                told = found[4:]
                return tuple(found[:4])

            weight, *rest = finished.kept(str(self.name), find)
            return (weight.to(self.module.weight.device), *rest, *told)

    class AWQProcessor(awq_processor.AWQProcessor):  # type: ignore[misc]
        """Finds a layer's scales and clipping values; its searches run in the same order every time."""

        searches = 0

        def _kept(self, search: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
            self.searches += 1
            return tuple(finished.kept(f"search {self.searches}", search))

        def _compute_best_scale(self, *arguments: object) -> tuple[Tensor, float]:
            def search() -> tuple[Tensor, Tensor]:
                scale, loss = super(AWQProcessor, self)._compute_best_scale(*arguments)
                return scale, torch.tensor(loss, dtype=torch.float64)

            scale, loss = self._kept(search)
            return scale, float(loss)

        def _compute_best_clip(self, *arguments: object) -> Tensor:
            return self._kept(lambda: (super(AWQProcessor, self)._compute_best_clip(*arguments),))[0]

    gptq_processor.GPTQ, awq_processor.AWQProcessor = GPTQ, AWQProcessor


def _serialized(config: Any) -> dict[str, Any]:  # noqa: ANN401 - a dictionary or one of the library's classes
    """What a loader needs of GPTQModel's configuration, without paths and memory settings of this machine."""
    document = config if isinstance(config, dict) else config.to_dict()
    meta = {key: document.get("meta", {}).get(key) for key in ("quantizer", "damp_percent", "act_group_aware")}
    return {**document, "meta": {key: value for key, value in meta.items() if value is not None}}


if __name__ == "__main__":
    main(work)
