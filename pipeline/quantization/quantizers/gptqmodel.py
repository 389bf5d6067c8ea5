"""Worker: GPTQ or AWQ by GPTQModel 7.5.0, on CPU or CUDA."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from expert_tokens import ExpertTokens  # type: ignore[import-not-found]
from quantizer_common import batch_size, calibration_blocks, prepare, store_as_float16  # type: ignore[import-not-found]
from slipway_worker import Report, WorkerError, main


def work(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Quantize ``source`` into the folder ``output``; see `QuantizationRequest` in `pipeline.quantization.quantize`."""
    # Its default is half the processors: slower, for no gain in the result. With one it doesn't start.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, len(os.sched_getaffinity(0)))))
    os.environ["GPTQMODEL_OFFLINE"] = "1"
    # It would compile its packing loop in every run, where the machine has a compiler; no result may depend on that.
    os.environ["GPTQMODEL_DISABLE_PACK_EXT"] = "1"
    device = prepare(request)
    blocks = calibration_blocks(request)
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
    experts = ExpertTokens(model.model, len(blocks) * request["max_tokens"])
    layers = model.model.config.get_text_config().num_hidden_layers

    def layer_done(layer_idx: int, submodule_finalized: bool) -> None:
        if not submodule_finalized:
            report(f"layer {layer_idx + 1} of {layers}")

    model.layer_callback = layer_done
    backend = (BACKEND.AWQ_TORCH if device == "cpu" else BACKEND.AUTO) if awq else BACKEND.GPTQ_TORCH
    try:
        model.quantize(
            [{"input_ids": block} for block in blocks],
            batch_size=batch_size(request["max_tokens"]),
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
        "blocks": len(blocks),
        "quantization_config": _serialized(model.model.config.quantization_config),
        "experts": experts.found(),
    }


def _config(request: dict[str, Any], device: str) -> Any:  # noqa: ANN401 - a class of a library without types
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


def _serialized(config: Any) -> dict[str, Any]:  # noqa: ANN401 - a dictionary or one of the library's classes
    """What a loader needs of GPTQModel's configuration, without paths and memory settings of this machine."""
    document = config if isinstance(config, dict) else config.to_dict()
    meta = {key: document.get("meta", {}).get(key) for key in ("quantizer", "damp_percent", "act_group_aware")}
    return {**document, "meta": {key: value for key, value in meta.items() if value is not None}}


if __name__ == "__main__":
    main(work)
