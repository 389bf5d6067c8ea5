"""The stage `quantized`: the weights in few bits, checked without the quantizer's help."""

from __future__ import annotations

from pipeline.quantization import quantize
from pipeline.quantization.formats.table import format_of
from pipeline.stages.code_version import code_version
from pipeline.stages.context import StageContext
from pipeline.stages.stage import Inputs, digests
from pipeline.store.artifacts import ArtifactDraft, Recipe
from pipeline.workers.environments import pins_digest
from pipeline.workers.launchers.configured import have_gpus
from registry.digests import digest_file


def recipe(context: StageContext, inputs: Inputs) -> Recipe:
    """The source, the calibration text, the scheme, and the quantizer with its pins."""
    calibration = context.spec.calibration
    backend = quantize.backend_of(context.scheme)
    return Recipe(
        "quantized",
        inputs={**digests(inputs), "calibration": f"sha256:{digest_file(calibration.uri)}"},
        parameters={
            **context.scheme.model_dump(mode="json"),
            "samples": calibration.samples,
            "max_tokens": calibration.max_tokens,
            **({} if calibration.min_expert_tokens is None else {"min_expert_tokens": calibration.min_expert_tokens}),
            "cuda": have_gpus(context.settings),
            "worker": code_version(backend.script),
            "format": code_version(format_of(context.scheme).__name__),
        },
        code=code_version(__name__),
        pins=pins_digest(backend.environment),
    )


def make(context: StageContext, inputs: Inputs, draft: ArtifactDraft) -> None:
    """Quantize in the backend's worker."""
    calibration = context.spec.calibration
    with context.worker_device():
        record = quantize.quantize(
            inputs["source"].folder,
            calibration.uri,
            calibration.samples,
            calibration.max_tokens,
            context.scheme,
            draft.folder,
            context.workers(draft),
            draft.scratch,
            context.progress,
            calibration.min_expert_tokens,
        )
    pins = pins_digest(quantize.backend_of(context.scheme).environment)
    draft.note(quantize.QuantizedNotes(**record.model_dump(), pins_digest=pins))
