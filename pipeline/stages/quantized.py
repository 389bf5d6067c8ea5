"""The stage `quantized`: the weights in few bits, checked without the quantizer's help.

Of a source that is quantized already it takes those weights (`pipeline.stages.published`).
"""

from __future__ import annotations

from pathlib import Path

from pipeline.compatibility.scheme import AS_IS
from pipeline.quantization import calibration_data, mixture, quantize
from pipeline.quantization.formats.table import format_of
from pipeline.spec import Calibration
from pipeline.stages import calibration, published
from pipeline.stages.code_version import code_version
from pipeline.stages.context import StageContext
from pipeline.stages.stage import Inputs, digests
from pipeline.store.artifacts import FINISHED, Artifact, ArtifactDraft, Recipe, require_room
from pipeline.workers.environments import pins_digest
from pipeline.workers.launchers.configured import have_gpus


def prepare(context: StageContext, inputs: Inputs) -> StageContext:
    """Resolve the revision of a source that is taken as it is."""
    return published.prepare(context, inputs) if context.scheme.method == AS_IS else context


def recipe(context: StageContext, inputs: Inputs) -> Recipe:
    """The source, the calibration text if the scheme needs one, the scheme, and the quantizer with its pins.

    The chat template is part of it only where conversations are rendered by it.
    """
    if context.scheme.method == AS_IS:
        return published.recipe(context, inputs)
    text = context.calibration
    template = None if text is None else context.serving.chat_template
    if template is not None and not calibration.may_hold_conversations(context):
        template = None
    backend = quantize.backend_of(context.scheme)
    return Recipe(
        "quantized",
        inputs={
            **digests(inputs),
            **({} if text is None else {"calibration": calibration.digest(context)}),
        },
        parameters={
            **context.scheme.model_dump(mode="json"),
            **({} if text is None else _parameters(text)),
            **({} if template is None else {"chat_template": template}),
            "cuda": have_gpus(context.settings),
            "worker": code_version(backend.script),
            **(_mixture() if context.scheme.method == "mixed" else {}),
            "format": code_version(format_of(context.scheme).__name__),
        },
        code=code_version(__name__),
        pins=pins_digest(backend.environment),
    )


def _mixture() -> dict[str, str]:
    return {"mixture": code_version(mixture.__name__), "sensitivity": code_version(mixture.SCRIPT)}


def make(context: StageContext, inputs: Inputs, draft: ArtifactDraft) -> None:
    """Quantize in the backend's worker; it continues with the layers that a run which was cut off has finished."""
    if context.scheme.method == AS_IS:
        published.make(context, inputs, draft)
        return
    text = context.calibration
    finished = sum(path.stat().st_size for path in (draft.scratch / FINISHED).glob("*"))
    room = max(0, quantize.backend_of(context.scheme).room * inputs["source"].size_bytes - finished)
    require_room(context.settings.home, room, context.settings.disk_floor, f"quantizing `{context.release_name}`")
    with context.worker_device():
        record = quantize.quantize(
            inputs["source"].folder,
            None if text is None else _samples_file(context, text, draft.scratch),
            0 if text is None else text.samples,
            0 if text is None else text.max_tokens,
            context.scheme,
            draft.folder,
            context.workers(draft),
            draft.scratch,
            context.progress,
            None if text is None else text.min_expert_tokens,
            context.spec.serve.chat_template,
        )
    pins = pins_digest(quantize.backend_of(context.scheme).environment)
    draft.note(quantize.QuantizedNotes(**record.model_dump(), pins_digest=pins))


def accept(context: StageContext, quantized: Artifact) -> None:
    """Hold calibration data, or a source that is taken as it is, to its lock."""
    (published if context.scheme.method == AS_IS else calibration).accept(context, quantized)


def _parameters(text: Calibration) -> dict[str, object]:
    return text.model_dump(include={"samples", "max_tokens", "min_expert_tokens"}, exclude_none=True)


def _samples_file(context: StageContext, text: Calibration, scratch: Path) -> Path:
    """The file that holds the samples: one of this machine, or one that is written with what was drawn."""
    if not text.mixture and text.is_here:
        return text.path
    path = scratch / "calibration.jsonl"
    calibration_data.write(calibration.samples(context), path)
    return path
